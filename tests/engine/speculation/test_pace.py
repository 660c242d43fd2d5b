"""Steps run ahead or wait: the faster way once both are known, and now and then the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from engine.core import EngineCore
from engine.kv.manager import KVManager
from engine.messages import Abort, Submit
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.speculation.lookup import Lookup
from engine.speculation.pace import MIN_WEIGHT, PROBE_EVERY, PROBE_STEPS, Pace, Rate
from engine.speculation.policy import DraftPolicy
from engine.step.executor import Launched
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from tests.support.engines.in_process import ask
from tests.support.engines.scripted_engine import INFO

CYCLE = PROBE_EVERY + PROBE_STEPS


def steps(pace: Pace, count: int, *, ahead: float, waiting: float) -> list[bool]:
    """Decode steps of one row, as `pace` chooses; they take `ahead` or `waiting` seconds."""
    ways = []
    for _ in range(count):
        ways.append(pace.runs_ahead())
        pace.observe(1, 1, ahead if ways[-1] else waiting, ahead=ways[-1])
    return ways


@pytest.mark.parametrize(("ahead", "waiting"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_way_is_taken_and_the_other_one_tried(ahead: float, waiting: float) -> None:
    pace = Pace()
    steps(pace, CYCLE - 1, ahead=ahead, waiting=waiting)  # the next cycle begins
    faster = ahead < waiting
    for _ in range(3):
        ways = steps(pace, CYCLE, ahead=ahead, waiting=waiting)
        assert ways == [faster] * PROBE_EVERY + [not faster] * PROBE_STEPS


def test_both_ways_are_tried_before_one_is_taken() -> None:
    pace = Pace()
    ways = steps(pace, 60, ahead=1.0, waiting=9.0)
    first = ways.index(False)
    back = ways.index(True, first)
    assert ways == [True] * first + [False] * (back - first) + [True] * (60 - back)
    assert first == back - first >= MIN_WEIGHT


def test_a_rate_counts_from_enough_observations_on() -> None:
    rate, enough = Rate(), 0
    while rate.weight < MIN_WEIGHT:
        rate.observe(2.0, 0.5)
        enough += 1
    assert rate.value == pytest.approx(4.0)
    pace = Pace()
    for way in (True, False):
        for _ in range(enough - 1):
            pace.observe(1, 1, 1.0 if way else 9.0, ahead=way)
    assert pace.runs_ahead() is True  # nothing is known yet: still the first way
    pace.observe(1, 1, 1.0, ahead=True)
    assert pace.runs_ahead() is False  # although it looks slower
    pace.observe(1, 1, 9.0, ahead=False)
    assert pace.runs_ahead() is True


@pytest.mark.parametrize("better", [True, False])
def test_a_change_of_speed_is_noticed(better: bool) -> None:
    pace = Pace()
    slow, fast = {"ahead": 3.0, "waiting": 1.0}, {"ahead": 1.0, "waiting": 3.0}
    before, after = (slow, fast) if better else (fast, slow)
    steps(pace, 2 * CYCLE - 1, **before)
    assert pace.runs_ahead() is not better
    steps(pace, 4 * CYCLE, **after)
    assert steps(pace, PROBE_EVERY // 2, **after) == [better] * (PROBE_EVERY // 2)


def test_what_counts_are_tokens_of_a_row() -> None:
    pace = Pace()
    for _ in range(20):
        pace.observe(16, 16, 1.0, ahead=True)  # more tokens, but only one per row
        pace.observe(2, 1, 1.0, ahead=False)
    assert pace.runs_ahead() is False


def test_a_step_without_rows_says_nothing() -> None:
    pace = Pace()
    steps(pace, 60, ahead=1.0, waiting=2.0)
    for _ in range(60):
        pace.observe(0, 0, 100.0, ahead=True)
    assert pace.runs_ahead() is True


@dataclass
class TimedExecutor:
    """Implements `Executor` with its own clock: steps ahead take `ahead` seconds."""

    ahead: float
    now: float = 0.0
    num_ahead: int = 0

    def launch(self, plan: StepPlan) -> Launched:
        self.num_ahead += plan.ahead
        outcome = StepOutcome(tuple(RowOutcome((7,)) for _ in plan.rows))
        return Launched(plan, lambda: outcome)

    def collect(self, launched: Launched) -> StepOutcome:
        self.now += self.ahead if launched.plan.ahead else 1.0
        return launched.wait()


@pytest.mark.parametrize(("lookup", "ahead", "share"), [
    (True, 0.5, 0.9), (True, 2.0, 0.1), (False, 0.5, 1.0), (False, 2.0, 1.0),
])  # fmt: skip
def test_a_core_runs_ahead_where_that_is_faster_and_always_where_nothing_is_looked_up(
    lookup: bool, ahead: float, share: float
) -> None:
    executor = TimedExecutor(ahead)
    scheduler = Scheduler(
        SchedulerLimits(4, 64, 1024), KVManager(300, 4, True), frozenset({2}), vocab_size=100
    )
    policy = DraftPolicy(lookup=Lookup() if lookup else None)
    core = EngineCore(scheduler, executor, INFO, policy, run_ahead=True, clock=lambda: executor.now)
    core.add(Submit(ask("a", [5], max_tokens=PROBE_EVERY)))
    num_steps = 0
    while core.has_work():
        core.step()
        num_steps += 1
    assert executor.num_ahead / num_steps == pytest.approx(share, abs=0.1)


@dataclass
class Noting:
    """In place of `Pace`: says what the test says, and notes what it is told."""

    ahead: bool = True
    noted: list[tuple[int, int, float, bool]] = field(default_factory=list)

    def runs_ahead(self) -> bool:
        return self.ahead

    def observe(self, num_tokens: int, num_rows: int, seconds: float, *, ahead: bool) -> None:
        self.noted.append((num_tokens, num_rows, seconds, ahead))


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> Noting:
    found = Noting()
    monkeypatch.setattr("engine.core.Pace", lambda: found)
    return found


def timed_core() -> tuple[EngineCore, TimedExecutor]:
    executor = TimedExecutor(0.5)
    scheduler = Scheduler(
        SchedulerLimits(4, 64, 1024), KVManager(300, 4, True), frozenset({2}), vocab_size=100
    )
    policy, clock = DraftPolicy(lookup=Lookup()), lambda: executor.now
    return EngineCore(scheduler, executor, INFO, policy, run_ahead=True, clock=clock), executor


def test_decode_steps_are_timed_and_steps_that_compute_a_prompt_are_not(noting: Noting) -> None:
    core, _ = timed_core()
    core.add(Submit(ask("a", [5, 6, 7], max_tokens=50)))
    for _ in range(3):
        core.step()
    assert noting.noted == [(1, 1, 0.5, True)] * 2
    core.add(Submit(ask("b", [8, 9, 10], max_tokens=50)))
    for _ in range(2):
        core.step()
    assert noting.noted == [(1, 1, 0.5, True)] * 3, "the prompt's step says nothing"
    core.step()
    assert noting.noted[3:] == [(2, 2, 0.5, True)]


def test_the_scheduler_learns_the_times_of_all_steps_but_the_first_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, executor = timed_core()
    seen: list[tuple[int, float]] = []

    def observe_time(_: Scheduler, plan: StepPlan, seconds: float) -> None:
        seen.append((plan.num_tokens, seconds))

    monkeypatch.setattr(Scheduler, "observe_time", observe_time)
    core.add(Submit(ask("a", [5, 6, 7], max_tokens=50)))
    for _ in range(2):
        core.step()
    assert seen == [(1, 0.5)], "the prompt was computed after a pause"
    core.add(Submit(ask("b", [8, 9, 10], max_tokens=50)))
    for _ in range(2):
        core.step()
    assert [seconds for _, seconds in seen[1:]] == [0.5, 1.0]
    assert seen[-1][0] > 3, "the step of the other prompt"
    core.add(Abort("a"))
    core.add(Abort("b"))
    while core.has_work():
        core.step()
    executor.now += 1000.0
    core.add(Submit(ask("c", [5, 6, 7], max_tokens=2)))
    while core.has_work():
        core.step()
    assert max(seconds for _, seconds in seen) == 1.0


def test_a_step_counts_for_the_way_in_which_it_was_launched(noting: Noting) -> None:
    core, _ = timed_core()
    noting.ahead = False
    core.add(Submit(ask("a", [5, 6, 7], max_tokens=50)))
    for _ in range(2):
        core.step()
    assert noting.noted == [(1, 1, 1.0, False)]
    noting.ahead = True
    for _ in range(2):
        core.step()
    assert noting.noted[1:] == [(1, 1, 1.0, False), (1, 1, 0.5, True)]
    noting.ahead = False
    for _ in range(2):
        core.step()
    assert noting.noted[3:] == [(1, 1, 0.5, True), (1, 1, 1.0, False)]


def test_rows_that_ended_meanwhile_do_not_count(noting: Noting) -> None:
    core, _ = timed_core()
    for name in "ab":
        core.add(Submit(ask(name, [5, 6, 7], max_tokens=50)))
    for _ in range(2):
        core.step()
    core.add(Abort("a"))
    core.step()
    assert noting.noted == [(2, 2, 0.5, True), (1, 1, 0.5, True)]


def test_a_pause_without_work_is_no_time_of_a_step(noting: Noting) -> None:
    core, executor = timed_core()
    core.add(Submit(ask("a", [5], max_tokens=2)))
    while core.has_work():
        core.step()
    executor.now += 1000.0
    core.add(Submit(ask("b", [6], max_tokens=2)))
    while core.has_work():
        core.step()
    assert [step for step in noting.noted if step[1]] == [(1, 1, 0.5, True)] * 2
