"""Who carries out plans: the one contract of a runner, of all ranks together, and of what checks
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.step.plan import StepOutcome, StepPlan


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device was told to run."""

    plan: StepPlan
    wait: Callable[[], StepOutcome]  # until the step is over; called once


class Executor(Protocol):
    """Carries out plans in the order in which they are launched.

    A plan that is `ahead` may be launched while the step before it is not collected; any other plan
    needs everything before it collected. Steps are collected in the order of launching.
    """

    def launch(self, plan: StepPlan) -> Launched: ...

    def collect(self, launched: Launched) -> StepOutcome: ...


def execute(executor: Executor, plan: StepPlan) -> StepOutcome:
    """Carry out a plan and wait for it."""
    return executor.collect(executor.launch(plan))
