"""How often drafts are looked up while steps are plain."""

from __future__ import annotations

from dataclasses import dataclass

from engine.step.plan import StepOutcome, StepPlan

ROWS_PER_STEP = 2  # in a batch of so many rows, looks that bring nothing pause for one step
MOST_PAUSE = 12  # steps


@dataclass(slots=True)
class Looks:
    """To look up drafts takes time for every row, and with many rows they seldom pay. So looks
    become rarer while they bring nothing; once a token is accepted, every step looks again."""

    _pause: int = 0  # plain steps between two looks
    _waited: int = 0  # of them
    _has_looked: bool = False  # in the newest step

    def is_due(self) -> bool:
        """Whether the next step looks. Call it once for every plain step."""
        self._has_looked = self._waited >= self._pause
        self._waited = 0 if self._has_looked else self._waited + 1
        return self._has_looked

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        rows = zip(plan.rows, outcome.rows, strict=True)
        if any(row.draft and result.path for row, result in rows):
            self._pause = 0
        elif self._has_looked:
            most = min(len(plan.rows) // ROWS_PER_STEP, MOST_PAUSE)
            self._pause = min(max(1, 2 * self._pause), most)
        self._has_looked = False
