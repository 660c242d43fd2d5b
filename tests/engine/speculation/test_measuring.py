"""Costs measured step by step while real steps go on."""

from __future__ import annotations

from collections.abc import Generator

from engine.runner.warmup import WarmUp
from engine.speculation.measuring import MeasuringPlanner
from engine.speculation.planner import FixedPlanner, Planner, StepCosts
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, chain

COSTS = StepCosts({"root": [(1, 1.0)]})


def measuring(num_steps: int, done: list[int]) -> Generator[None, None, StepCosts]:
    for step in range(num_steps):
        done.append(step)
        yield
    return COSTS


def test_one_made_up_step_is_measured_besides_each_real_one_and_then_it_is_decided() -> None:
    done: list[int] = []
    decided: list[StepCosts] = []

    def decide(costs: StepCosts) -> Planner:
        decided.append(costs)
        return FixedPlanner(chain(2))

    planner = MeasuringPlanner(measuring(3, done), decide)
    for step in range(3):
        assert planner.choose(4) is ROOT
        assert done == list(range(step + 1))
        planner.observe(StepPlan(), StepOutcome())
    for _ in range(5):
        assert planner.choose(4) == chain(2)
        planner.observe(StepPlan(), StepOutcome())
    assert decided == [COSTS]


class CountingExecutor:
    def __init__(self) -> None:
        self.num_steps = 0

    def execute(self, plan: StepPlan) -> StepOutcome:
        self.num_steps += 1
        return StepOutcome(tuple(RowOutcome((7,)) for _ in plan.rows))


def test_a_measurement_runs_no_more_than_two_steps_at_a_time() -> None:
    executor = CountingExecutor()
    steps = WarmUp(executor, 160, 16, 16, 256, 512).steps([ROOT, chain(3)])
    before = 0
    for _ in steps:
        assert executor.num_steps - before <= 2  # the last of a round also releases its rows
        before = executor.num_steps
    assert before > 20
