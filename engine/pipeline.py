"""The one-step pipeline: the device gets its next round before the host waits for the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from engine.step.plan import StepOutcome, StepPlan


class Ticket(Protocol):
    """A step that was launched."""

    @property
    def leads(self) -> bool:
        """Whether a plan that is ahead may follow before this step is collected."""
        ...


Launched = TypeVar("Launched", bound=Ticket)


class Launcher(Protocol[Launched]):
    """Carries out a plan in two halves; implemented by `ModelRunner`."""

    def launch(self, plan: StepPlan) -> Launched: ...

    def collect(self, ticket: Launched) -> StepOutcome: ...


@dataclass(slots=True)
class Pipeline(Generic[Launched]):
    """Steps through a launcher. Between two steps, one round at most is in flight."""

    launcher: Launcher[Launched]
    _flight: tuple[StepPlan, Launched] | None = field(default=None, init=False)

    @property
    def in_flight(self) -> bool:
        return self._flight is not None

    def step(
        self,
        schedule: Callable[[], StepPlan],
        schedule_ahead: Callable[[StepPlan], StepPlan | None],
    ) -> tuple[StepPlan, StepOutcome]:
        """Launch the step behind the one in flight, if there can be one, then wait for that.

        Args:
            schedule: plans a step when nothing is in flight.
            schedule_ahead: plans the step behind another, None if its outcome is needed first.
        """
        plan, ticket = self._flight or self._launch(schedule())
        behind = schedule_ahead(plan) if ticket.leads else None
        self._flight = None if behind is None else self._launch(behind)
        return plan, self.launcher.collect(ticket)

    def land(self) -> tuple[StepPlan, StepOutcome] | None:
        """Wait for what is in flight, without another step behind it; None if nothing is."""
        if self._flight is None:
            return None
        (plan, ticket), self._flight = self._flight, None
        return plan, self.launcher.collect(ticket)

    def _launch(self, plan: StepPlan) -> tuple[StepPlan, Launched]:
        return plan, self.launcher.launch(plan)
