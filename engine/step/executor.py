"""The interface of everything that runs plans: a runner, a group of ranks, and their checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.step.plan import StepOutcome, StepPlan


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that was launched on the device."""

    plan: StepPlan
    wait: Callable[[], StepOutcome]  # waits until the step has finished; called once


class Executor(Protocol):
    """Runs plans in the order of launching, and collects them in the same order.

    A plan that is `ahead` may be launched before the previous step is collected; before any other
    plan, all earlier steps must be collected.
    """

    def launch(self, plan: StepPlan) -> Launched: ...

    def collect(self, launched: Launched) -> StepOutcome: ...


def execute(executor: Executor, plan: StepPlan) -> StepOutcome:
    """Run a plan and wait for its outcome."""
    return executor.collect(executor.launch(plan))
