"""Chooses the tree shape of the next step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.step.plan import StepOutcome, StepPlan
from engine.step.shape import ROOT, StaticShape, TreeShape


class Planner(Protocol):
    """Chooses a shape per step. Only speed depends on it."""

    def choose(self, num_drafting: int) -> TreeShape:
        """The shape for a step with `num_drafting` rows that could carry a tree."""
        ...

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Learn from the accepted tokens of a step."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPlanner:
    """Always the same shape."""

    shape: TreeShape = ROOT

    def choose(self, num_drafting: int) -> TreeShape:
        return self.shape if num_drafting else ROOT

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """A fixed shape needs no observations."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Measured seconds of one step, by shape name and number of rows; linear in between."""

    seconds: Mapping[str, Sequence[tuple[int, float]]]  # ascending rows

    def of(self, shape: TreeShape, num_rows: int) -> float:
        points = self.seconds[shape.name]
        at = bisect_left(points, (num_rows, 0.0))
        if at == 0:
            return points[0][1]
        if at == len(points):  # beyond the measured numbers: in proportion to rows
            return points[-1][1] * num_rows / points[-1][0]
        (low, before), (high, after) = points[at - 1], points[at]
        return before + (after - before) * (num_rows - low) / (high - low)


DECAY = 0.98  # weight of the past per observed tree
PRIOR = (
    0.55,
    0.15,
    0.08,
    0.05,
    0.04,
    0.03,
    0.02,
    0.02,
)  # chance of the r-th child, before any tree
PRIOR_TREES = 8.0  # how many observations the prior stands for


@dataclass(slots=True)
class Acceptance:
    """Running estimate of the chance that an accepted node's r-th child is the drawn token."""

    seen: float = PRIOR_TREES  # accepted nodes that had children
    hits: list[float] = field(default_factory=lambda: [p * PRIOR_TREES for p in PRIOR])

    def observe(self, shape: StaticShape, num_nodes: int, path: Sequence[int]) -> None:
        """`path`: accepted nodes without the root; the tree is the shape's first `num_nodes`."""
        node = 0
        for child in (*path, None):
            children = [n for n in range(num_nodes) if shape.parents[n] == node]
            if not children:
                return
            self._age()
            self.seen += 1
            if child is None:
                return
            rank = children.index(child)
            if rank < len(self.hits):
                self.hits[rank] += 1
            node = child

    def expected_emitted(self, shape: StaticShape) -> float:
        """Mean tokens emitted per tree, including the bonus token."""
        reach: list[float] = []
        ranks: dict[int, int] = {}
        for parent in shape.parents:
            if parent < 0:
                reach.append(1.0)
                continue
            rank = ranks.get(parent, 0)
            ranks[parent] = rank + 1
            reach.append(reach[parent] * self.chance(rank))
        return sum(reach)

    def chance(self, rank: int) -> float:
        return min(1.0, self.hits[rank] / self.seen) if rank < len(self.hits) else 0.0

    def _age(self) -> None:
        self.seen *= DECAY
        self.hits = [hit * DECAY for hit in self.hits]


HYSTERESIS = 1.03  # how much better another shape must look to replace the current one
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1 << 30)


class AdaptivePlanner:
    """Takes the shape with the most expected tokens per second, from measured step times and the
    running acceptance. While no tree pays, one step in `probe_every` still carries the cheapest
    tree, to notice a change of the traffic. A probe that found no room stays due; with steps
    planned ahead, a probe runs twice, because its outcome comes after the next plan."""

    def __init__(
        self, shapes: Sequence[StaticShape], costs: StepCosts, probe_every: int = 64
    ) -> None:
        """`shapes`: the candidates besides the lone root, the cheapest first. They are static: the
        acceptance by rank does not predict the tokens of a dynamic shape."""
        self._shapes = (ROOT, *shapes)
        self._costs = costs
        self._acceptance = Acceptance()
        self._current: dict[int, StaticShape] = {}
        self._probe_every = probe_every
        self._since_drafts = 0  # steps that could have carried trees but did not

    def choose(self, num_drafting: int) -> TreeShape:
        if num_drafting == 0:
            return ROOT
        bucket = BUCKETS[bisect_left(BUCKETS, num_drafting)]
        current = self._current.get(bucket, ROOT)
        best = max(self._shapes, key=lambda shape: self._rate(shape, num_drafting))
        if self._rate(best, num_drafting) > HYSTERESIS * self._rate(current, num_drafting):
            self._current[bucket] = current = best
        return self._probing(current)

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None:
        if plan.is_drafted:
            self._since_drafts = 0
        shape = next((shape for shape in self._shapes if shape == plan.shape), ROOT)
        for row, result in zip(plan.rows, outcome.rows, strict=True):
            if result.num_draft and not row.draft:
                self._acceptance.observe(shape, 1 + result.num_draft, result.path)

    def _rate(self, shape: StaticShape, num_rows: int) -> float:
        """Expected tokens of all rows per second."""
        emitted = self._acceptance.expected_emitted(shape)
        return num_rows * emitted / self._costs.of(shape, num_rows)

    def _probing(self, chosen: StaticShape) -> StaticShape:
        self._since_drafts += 1
        due = self._since_drafts >= self._probe_every and len(self._shapes) > 1
        return self._shapes[1] if chosen == ROOT and due else chosen
