"""Ranks that drift apart, hang or end are noticed."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from engine.parallel.frames import DraftLoaded, LoadDraft, Order

from engine.parallel.agreement import RefusedByAllError, check_all, smallest
from engine.parallel.lockstep import DriftCheck, Progress
from engine.parallel.orders import Orders
from engine.parallel.watchdog import Watchdog
from engine.step.plan import RowOutcome, RowPlan, StepOutcome, StepPlan
from tests.support.inboxes import connected
from tests.support.thread_group import ThreadGroup, run_ranks

WAIT = 30.0
PLAN = StepPlan((RowPlan("r", 0, [3, 4], [0], samples=True),))


class Says:
    """Emits one token per step; from some step on, another one."""

    def __init__(self, token: int, later: int) -> None:
        self._tokens = iter([token, token, later, later, later])

    def execute(self, plan: StepPlan) -> StepOutcome:
        return StepOutcome((RowOutcome((next(self._tokens),)),))


def run_steps(later: int, last: int) -> None:
    """Steps of two ranks with a check after every second one; the check of step `last` fails."""

    def on_rank(group: ThreadGroup) -> None:
        checked = DriftCheck(Says(7, later if group.rank else 7), group, 2)
        for step in range(5):
            if step == last:
                with pytest.raises(RuntimeError, match="apart within the last 2 of 4 steps"):
                    checked.execute(PLAN)
                return
            checked.execute(PLAN)

    run_ranks(2, on_rank)


def test_ranks_that_agree_go_on() -> None:
    run_steps(later=7, last=5)


def test_another_token_on_one_rank_is_noticed_by_all_at_the_next_check() -> None:
    run_steps(later=8, last=3)


def test_ranks_refuse_together() -> None:
    def on_rank(group: ThreadGroup) -> str:
        with pytest.raises(RefusedByAllError) as caught:
            check_all("no memory, nö" if group.rank == 1 else None, group)
        return str(caught.value)

    assert run_ranks(3, on_rank) == ["rank 1: no memory, nö"] * 3


def test_ranks_agree_on_the_smallest() -> None:
    assert run_ranks(3, lambda group: smallest(7 - group.rank, group)) == [5, 5, 5]


def test_followers_say_who_cannot_load_a_head_and_why() -> None:
    broadcast, followers = connected(3)
    orders = Orders(broadcast)
    orders.load_draft("/heads/new")
    for rank, (follower, channel) in enumerate(followers, 1):
        frame = follower.receive()
        assert frame is not None
        assert msgspec.msgpack.decode(frame, type=Order) == LoadDraft("/heads/new")
        if rank < 3:
            answer = DraftLoaded(rank, "no room" if rank == 2 else None)
            channel.send(msgspec.msgpack.encode(answer))
        follower.close()
    assert orders.failures() == ["rank 2: no room", "rank 3 has ended"]
    broadcast.close()


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that wait for their standard input to end."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def watch(
    processes: list[subprocess.Popen[bytes]], limit: float
) -> tuple[Progress, Watchdog, queue.Queue[str]]:
    heard: queue.Queue[str] = queue.Queue()
    progress = Progress(limit)
    return progress, Watchdog([p.pid for p in processes], progress, heard.put), heard


def test_the_end_of_a_follower_is_noticed(sleepers: list[subprocess.Popen[bytes]]) -> None:
    _, watchdog, heard = watch(sleepers, WAIT)
    watchdog.start()
    sleepers[1].send_signal(signal.SIGKILL)
    assert heard.get(timeout=WAIT) == "rank 2 has ended"
    watchdog.stop()


def test_a_step_without_an_end_is_noticed(sleepers: list[subprocess.Popen[bytes]]) -> None:
    progress, watchdog, heard = watch(sleepers, 0.01)
    watchdog.start()
    with progress.step():
        assert heard.get(timeout=WAIT).startswith("a rank does not answer")
    watchdog.stop()


def test_an_idle_group_is_never_overdue() -> None:
    progress = Progress(0.0)
    assert not progress.overdue
    with progress.step():
        while not progress.overdue:
            pass
    assert not progress.overdue


def test_ends_that_were_asked_for_are_not_losses(sleepers: list[subprocess.Popen[bytes]]) -> None:
    _, watchdog, heard = watch(sleepers, WAIT)
    watchdog.start()
    watchdog.stop()
    for process in sleepers:
        process.kill()
        process.wait()
    assert heard.empty()
