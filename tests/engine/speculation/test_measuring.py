"""Costs are measured step by step between real steps."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from engine.core import EngineCore
from engine.kv.manager import KVManager
from engine.messages import Submit
from engine.runner.measuring import StepMeter
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.speculation.costs import StepCosts
from engine.speculation.planner import FixedPlanner, Planner
from engine.speculation.policy import DraftPolicy, Measuring
from engine.step.executor import Launched
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, TreeShape, chain
from tests.support.engines.in_process import ask
from tests.support.engines.scripted_engine import INFO

COSTS = StepCosts.guessed()


@dataclass
class Journal:
    """Implements `Executor` and records the order of calls."""

    noted: list[str] = field(default_factory=list)
    shapes: list[TreeShape] = field(default_factory=list)
    num_ahead: int = 0

    def launch(self, plan: StepPlan) -> Launched:
        self.noted.append("launch")
        self.shapes.append(plan.shape)
        self.num_ahead += plan.ahead
        outcome = StepOutcome(tuple(RowOutcome((7,)) for _ in plan.rows))
        return Launched(plan, lambda: outcome)

    def collect(self, launched: Launched) -> StepOutcome:
        self.noted.append("collect")
        return launched.wait()

    @property
    def in_flight(self) -> int:
        return self.noted.count("launch") - self.noted.count("collect")


@dataclass
class MadeUp:
    """Made-up steps: each asserts that no real step is in flight."""

    journal: Journal
    num_steps: int
    decided: list[StepCosts] = field(default_factory=list)

    def steps(self) -> Generator[None, None, StepCosts]:
        for _ in range(self.num_steps):
            assert self.journal.in_flight == 0
            self.journal.noted.append("made up")
            yield
        return COSTS

    def policy(self) -> DraftPolicy:
        def decide(costs: StepCosts) -> Planner:
            self.decided.append(costs)
            return FixedPlanner(chain(2))

        return DraftPolicy(measuring=Measuring(self.steps(), decide))


def core_over(journal: Journal, policy: DraftPolicy | None = None) -> EngineCore:
    """A core that runs ahead when it may, with two running requests."""
    scheduler = Scheduler(
        SchedulerLimits(4, 64, 64), KVManager(32, 4, True), frozenset({2}), vocab_size=100
    )
    core = EngineCore(scheduler, journal, INFO, policy, run_ahead=True)
    for name in "ab":
        core.add(Submit(ask(name, [5, 6, 7], max_tokens=60)))
    return core


def test_one_made_up_step_runs_beside_each_real_one_and_then_it_is_decided() -> None:
    journal = Journal()
    made_up = MadeUp(journal, 3)
    core = core_over(journal, made_up.policy())
    for _ in range(3):
        core.step()
    assert journal.noted == ["made up", "launch", "collect"] * 3
    assert journal.shapes == [ROOT] * 3
    assert made_up.decided == []
    for _ in range(5):
        core.step()
    assert made_up.decided == [COSTS]
    assert journal.noted.count("made up") == 3
    assert set(journal.shapes[3:]) == {chain(2)}


def test_nothing_is_launched_ahead_before_it_is_decided() -> None:
    journal = Journal()
    core = core_over(journal, MadeUp(journal, 4).policy())
    for _ in range(4):
        core.step()
        assert journal.in_flight == 0
    assert journal.num_ahead == 0
    for _ in range(4):
        core.step()
    assert journal.num_ahead > 0


def test_the_step_in_flight_is_collected_before_a_new_policy_is_measured() -> None:
    journal = Journal()
    core = core_over(journal)
    for _ in range(3):
        core.step()
    assert journal.in_flight == 1
    core.draft_with(MadeUp(journal, 2).policy())
    assert journal.in_flight == 0
    for _ in range(2):
        core.step()
    assert journal.noted[-6:] == ["made up", "launch", "collect"] * 2


class CountingExecutor:
    def __init__(self) -> None:
        self.num_steps = 0

    def launch(self, plan: StepPlan) -> Launched:
        self.num_steps += 1
        return Launched(plan, lambda: StepOutcome(tuple(RowOutcome((7,)) for _ in plan.rows)))

    def collect(self, launched: Launched) -> StepOutcome:
        return launched.wait()


def test_a_measurement_runs_no_more_than_two_steps_at_a_time() -> None:
    executor = CountingExecutor()
    steps = StepMeter(executor, 160, 16, 16, 256, 512).steps([ROOT, chain(3)])
    before = 0
    for _ in steps:
        assert executor.num_steps - before <= 2  # the last of a round also releases its rows
        before = executor.num_steps
    assert before > 20
