"""Choose trees for a draft head whose costs are not known yet, without stopping to measure them."""

from __future__ import annotations

from collections.abc import Callable, Generator

from engine.speculation.planner import Planner, StepCosts
from engine.step.plan import StepOutcome, StepPlan
from engine.step.shape import ROOT, TreeShape


class MeasuringPlanner:
    """Measures one made-up step besides every real one, and drafts nothing meanwhile; then what
    was measured decides."""

    def __init__(
        self,
        measuring: Generator[None, None, StepCosts],
        decide: Callable[[StepCosts], Planner],
    ) -> None:
        self._measuring = measuring
        self._decide = decide
        self._chosen: Planner | None = None

    @property
    def measures(self) -> bool:
        return self._chosen is None

    def choose(self, num_drafting: int) -> TreeShape:
        if self._chosen is None:
            self._measure()
        return ROOT if self._chosen is None else self._chosen.choose(num_drafting)

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        if self._chosen is not None:
            self._chosen.observe(plan, outcome)

    def _measure(self) -> None:
        try:
            next(self._measuring)
        except StopIteration as end:
            self._chosen = self._decide(end.value)
            self._measuring.close()
