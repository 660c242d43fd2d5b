"""Ranks that drift apart, hang or end are noticed."""

from __future__ import annotations

import itertools
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace

import msgspec
import pytest

from engine.parallel.agreement import RefusedByAllError, check_all, smallest
from engine.parallel.lockstep import DriftCheck, Following, GroupExecutor, Progress
from engine.parallel.orders import DraftLoaded, LoadDraft, Order, Orders, RunStep, Stop
from engine.parallel.watchdog import POLL, Watchdog
from engine.step.executor import Executor, Launched, execute
from engine.step.plan import RowOutcome, RowPlan, StepOutcome, StepPlan
from engine.step.shape import chain
from tests.support.ranks.inboxes import connected
from tests.support.ranks.thread_group import ThreadGroup, run_ranks
from tests.support.waiting import DEADLINE


def plan_of(number: int, *, ahead: bool = False) -> StepPlan:
    row = RowPlan(
        line=0, start=number, token_ids=(3,), first_block=0, new_blocks=(number,), samples=True
    )
    return StepPlan(rows=(row,), ahead=ahead)


def plans_of(kinds: str) -> list[StepPlan]:
    """A plan per letter: `a` is ahead, any other is not."""
    return [plan_of(number, ahead=kind == "a") for number, kind in enumerate(kinds)]


class Says:
    """Emits 7 in the first two steps, then `later`."""

    def __init__(self, later: int) -> None:
        self._later = later
        self.done: list[tuple[str, int]] = []

    def launch(self, plan: StepPlan) -> Launched:
        number = plan.rows[0].start
        self.done.append(("launch", number))
        token = 7 if number < 2 else self._later
        return Launched(plan, lambda: StepOutcome((RowOutcome((token,)),)))

    def collect(self, launched: Launched) -> StepOutcome:
        self.done.append(("collect", launched.plan.rows[0].start))
        return launched.wait()


def lead(executor: Executor, plans: Sequence[StepPlan]) -> None:
    """As rank 0's core does: collect a step at once, unless the next one is ahead."""
    flight: Launched | None = None
    for plan, following in pairwise([*plans, StepPlan()]):
        launched = executor.launch(plan)
        if flight is not None:
            executor.collect(flight)
        flight = launched if following.ahead else None
        if flight is None:
            executor.collect(launched)


def follow(executor: Executor, plans: Sequence[StepPlan]) -> None:
    following = Following(executor)
    for plan in plans:
        following.run(plan)
    following.land()


def run_steps(kinds: str, later: int) -> list[tuple[str | None, int]]:
    """Run two ranks that compare every two steps; the second emits `later` after two steps. Returns
    what each raised, and how many steps it launched."""
    plans = plans_of(kinds)

    def on_rank(group: ThreadGroup) -> tuple[str | None, int]:
        says = Says(later if group.rank else 7)
        checked = DriftCheck(says, group, 2)
        error = None
        try:
            (follow if group.rank else lead)(checked, plans)
        except RuntimeError as drift:
            error = str(drift).partition(":")[0]
        return error, sum(kind == "launch" for kind, _ in says.done)

    return run_ranks(2, on_rank)


KINDS = ["pppppppp", "paaaaaaa", "papapapa", "ppaapaaa"]


@pytest.mark.parametrize("kinds", KINDS)
def test_ranks_that_agree_continue(kinds: str) -> None:
    assert run_steps(kinds, later=7) == [(None, 8)] * 2


@pytest.mark.parametrize(
    ("kinds", "steps", "launched"),
    [
        ("pppppppp", "2 of 4", 4),
        ("paaaaaaa", "2 of 4", 5),  # one step is in flight when ranks compare
        ("papapapa", "2 of 4", 4),
        ("ppaapaaa", "2 of 4", 4),
        ("paapaaaa", "3 of 3", 3),  # before a plan that is not ahead, all steps are collected
    ],
)
def test_another_token_on_one_rank_is_noticed_by_all_at_the_next_check(
    kinds: str, steps: str, launched: int
) -> None:
    error = f"ranks have drifted apart within the last {steps} steps"
    assert run_steps(kinds, later=8) == [(error, launched)] * 2


@pytest.mark.parametrize(
    "other",
    [
        plan_of(1),
        msgspec.structs.replace(plan_of(0), released=(2,)),
        msgspec.structs.replace(plan_of(0), shape=chain(1)),
    ],
    ids=["rows", "released", "shape"],
)
def test_another_plan_on_one_rank_is_noticed(other: StepPlan) -> None:
    def on_rank(group: ThreadGroup) -> None:
        checked = DriftCheck(Says(7), group, 1)
        execute(checked, [plan_of(0), other][group.rank])
        checked.launch(plan_of(0))

    with pytest.raises(RuntimeError, match="apart within the last 1 of 1 steps"):
        run_ranks(2, on_rank)


def test_a_follower_launches_a_plan_that_is_ahead_before_it_collects_the_one_before() -> None:
    says = Says(7)
    follow(says, plans_of("paapp"))
    assert says.done == [
        ("launch", 0),
        ("launch", 1),
        ("collect", 0),
        ("launch", 2),
        ("collect", 1),
        ("collect", 2),  # before a plan that is not ahead
        ("launch", 3),
        ("collect", 3),
        ("launch", 4),
        ("collect", 4),
    ]


@pytest.mark.parametrize("scratch", [False, True])
def test_followers_get_a_step_when_it_is_launched_and_nothing_when_it_is_collected(
    scratch: bool,
) -> None:
    broadcast, ((follower, _),) = connected(1)
    orders, progress, says = Orders(broadcast), Progress(DEADLINE), Says(7)
    group = GroupExecutor(says, orders, progress, scratch=scratch)
    launched = group.launch(plan_of(4))
    assert says.done == [("launch", 4)]
    assert group.collect(launched).rows[0].emitted == (7,)
    orders.stop()
    frames = [follower.receive() or b"" for _ in range(2)]
    heard = [msgspec.msgpack.decode(frame, type=Order) for frame in frames]
    assert heard == [RunStep(plan_of(4), scratch), Stop()]
    follower.close()
    broadcast.close()


@pytest.mark.parametrize("part", ["launch", "collect"])
def test_progress_tells_when_a_step_is_launched_or_waited_for(part: str) -> None:
    broadcast, ((follower, _),) = connected(1)
    progress, overdue = Progress(0.0), []

    class Slow(Says):
        def launch(self, plan: StepPlan) -> Launched:
            self._look("launch")
            return super().launch(plan)

        def collect(self, launched: Launched) -> StepOutcome:
            self._look("collect")
            return super().collect(launched)

        def _look(self, where: str) -> None:
            while where == part and not progress.overdue:
                pass
            overdue.append(progress.overdue)

    execute(GroupExecutor(Slow(7), Orders(broadcast), progress), plan_of(0))
    assert any(overdue)
    assert not progress.overdue
    follower.close()
    broadcast.close()


def test_ranks_refuse_together() -> None:
    def on_rank(group: ThreadGroup) -> str:
        with pytest.raises(RefusedByAllError) as caught:
            check_all("no memory, nö" if group.rank == 1 else None, group)
        return str(caught.value)

    assert run_ranks(3, on_rank) == ["rank 1: no memory, nö"] * 3


def test_ranks_agree_on_the_smallest() -> None:
    assert run_ranks(3, lambda group: smallest(7 - group.rank, group)) == [5, 5, 5]


def test_followers_report_which_rank_cannot_load_a_head_and_why() -> None:
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
    _, watchdog, heard = watch(sleepers, DEADLINE)
    watchdog.start()
    sleepers[1].send_signal(signal.SIGKILL)
    assert heard.get(timeout=DEADLINE) == "rank 2 has ended"
    watchdog.stop()


def test_a_step_without_an_end_is_noticed(sleepers: list[subprocess.Popen[bytes]]) -> None:
    progress, watchdog, heard = watch(sleepers, 0.01)
    watchdog.start()
    with progress.step():
        assert heard.get(timeout=DEADLINE).startswith("a rank does not answer")
    watchdog.stop()


def test_an_idle_group_is_never_overdue() -> None:
    progress = Progress(0.0)
    assert not progress.overdue
    with progress.step():
        while not progress.overdue:
            pass
    assert not progress.overdue


def test_time_in_which_rank_0_stood_still_is_not_the_time_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 15.0, 15.0, 21.0, 30.0, 41.0])
    monkeypatch.setattr(
        "engine.parallel.lockstep.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    progress = Progress(10.0)
    with progress.step():  # at 0
        assert progress.overdue  # at 15
        progress.excuse(14.0)
        assert not progress.overdue  # at 15
    with progress.step():  # at 21; what was excused before does not count
        assert not progress.overdue  # at 30
        assert progress.overdue  # at 41


def test_a_watchdog_that_stood_still_excuses_the_step(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, watchdog, _ = watch(sleepers, DEADLINE)
    clock, excused = itertools.count(0.0, 100.0), queue.Queue[float]()
    monkeypatch.setattr(
        "engine.parallel.watchdog.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    monkeypatch.setattr(progress, "excuse", excused.put)
    watchdog.start()
    assert excused.get(timeout=DEADLINE) == 100.0 - 2 * POLL
    watchdog.stop()


def test_ends_that_were_asked_for_are_not_losses(sleepers: list[subprocess.Popen[bytes]]) -> None:
    _, watchdog, heard = watch(sleepers, DEADLINE)
    watchdog.start()
    watchdog.stop()
    for process in sleepers:
        process.kill()
        process.wait()
    assert heard.empty()
