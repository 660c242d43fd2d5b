"""Which tree to verify in the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.spec.shape import ROOT, TreeShape


class Planner(Protocol):
    """Chooses a shape per step. Only speed depends on it."""

    def choose(self, num_decoding: int) -> TreeShape:
        """The shape for a step with `num_decoding` rows that could carry a tree."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPlanner:
    """Always the same shape."""

    shape: TreeShape = ROOT

    def choose(self, num_decoding: int) -> TreeShape:
        return self.shape if num_decoding else ROOT
