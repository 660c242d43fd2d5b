"""How likely draft tokens are accepted: by class of requests, depth and rank, and by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.step.shape import StaticShape

PRIOR = (0.55, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)  # chance of the r-th child
PRIOR_TREES = 8.0  # how many observations of a class the prior stands for
CLASS_DECAY = 0.98  # weight of the past per observation
ROW_DECAY = 0.95
SPREAD_DECAY = 0.9  # the same per row that was compared with its class
VARIANCE = 0.03  # of the chances of rows in a class, before any row
CLASS_WEIGHTS = (1.0, 30.0)  # least and most own observations that a row's class may stand for
COMPARED_EVERY = 16  # observations of a row after which it is compared with its class
LEAST_COMPARED = 4


@dataclass(slots=True)
class Depth:
    """Accepted nodes of one depth that had children, and how often each rank was drawn."""

    seen: float = PRIOR_TREES
    hits: list[float] = field(default_factory=lambda: [p * PRIOR_TREES for p in PRIOR])
    variance: float = VARIANCE  # of the rows' own chances that any child is accepted

    @property
    def any_child(self) -> float:
        """Chance that any child is accepted."""
        return min(0.999, sum(self.hits) / self.seen)

    def compare(self, row: RowDepth) -> None:
        """Learn how much rows differ, from the chance of one of them. What its few observations
        make it differ anyway does not count."""
        if row.seen < LEAST_COMPARED:
            return
        mean = self.any_child
        excess = (row.hits / row.seen - mean) ** 2 - mean * (1 - mean) / row.seen
        self.variance = max(1e-4, self.variance + (1 - SPREAD_DECAY) * (excess - self.variance))

    def observe(self, rank: int | None) -> None:
        """`rank` of the accepted child; None: no child was accepted."""
        self.seen = CLASS_DECAY * self.seen + 1
        self.hits = [CLASS_DECAY * hit for hit in self.hits]
        if rank is not None and rank < len(self.hits):
            self.hits[rank] += 1


@dataclass(slots=True)
class RowDepth:
    """The same of one row: how often any child was accepted."""

    seen: float = 0.0
    hits: float = 0.0
    num_observed: int = 0

    def observe(self, *, accepted: bool) -> None:
        self.seen = ROW_DECAY * self.seen + 1
        self.hits = ROW_DECAY * self.hits + accepted
        self.num_observed += 1

    def chance(self, of_class: Depth) -> float:
        """Own observations count the more, the more the rows of the class differ. As long as there
        are few, the row counts as one of the better ones: it is worth finding out."""
        mean, variance = of_class.any_child, of_class.variance
        least, most = CLASS_WEIGHTS
        weight = min(max(mean * (1 - mean) / variance - 1, least), most)
        hoped = min(0.99, mean + math.sqrt(variance) / (1 + self.seen))
        return (weight * hoped + self.hits) / (weight + self.seen)

    def fade(self) -> None:
        """Trust old observations less."""
        self.seen, self.hits = self.seen / 2, self.hits / 2


UNSEEN = RowDepth()


@dataclass(slots=True)
class Acceptance:
    """Running estimates for the rows of one engine."""

    _classes: dict[bool, list[Depth]] = field(default_factory=lambda: {False: [], True: []})
    _rows: dict[int, list[RowDepth]] = field(default_factory=dict)  # by line

    def reach(self, line: int, shape: StaticShape, *, sampled: bool) -> list[float]:
        """The chance of every draft node of `shape` to be accepted, those of its ancestors
        included; the root is left out."""
        rows = self._rows.get(line, [])
        found, ranks, at_depth = [1.0], [0] * shape.num_nodes, [0]
        for parent in shape.parents[1:]:
            depth, rank = at_depth[parent], ranks[parent]
            ranks[parent] += 1
            at_depth.append(depth + 1)
            of_class = self._of_class(depth, sampled=sampled)
            own = rows[depth] if depth < len(rows) else UNSEEN
            found.append(found[parent] * _chance(of_class, own, rank))
        return found[1:]

    def observe(
        self, line: int, shape: StaticShape, num_nodes: int, path: Sequence[int], *, sampled: bool
    ) -> None:
        """Learn from a tree of the first `num_nodes` nodes of `shape`. `path`: the accepted nodes
        without the root."""
        node, row = 0, self._rows.setdefault(line, [])
        for depth, child in enumerate((*path, None)):
            children = [n for n in range(1, num_nodes) if shape.parents[n] == node]
            if not children:
                return
            if depth == len(row):
                row.append(RowDepth())
            row[depth].observe(accepted=child is not None)
            of_class = self._of_class(depth, sampled=sampled)
            of_class.observe(None if child is None else children.index(child))
            if row[depth].num_observed % COMPARED_EVERY == LEAST_COMPARED:
                of_class.compare(row[depth])
            if child is None:
                return
            node = child

    def fade(self, line: int) -> None:
        """Trust the observations of a row less, because they are old."""
        for depth in self._rows.get(line, []):
            depth.fade()

    def forget(self, line: int) -> None:
        """The line has a new sequence."""
        self._rows.pop(line, None)

    def _of_class(self, depth: int, *, sampled: bool) -> Depth:
        depths = self._classes[sampled]
        while depth >= len(depths):
            depths.append(Depth())
        return depths[depth]


def _chance(of_class: Depth, own: RowDepth, rank: int) -> float:
    """Chance of one child. A row has its own chance that any child is accepted; how that is shared
    among the ranks is a matter of the class."""
    if rank >= len(of_class.hits):
        return 0.0
    total = sum(of_class.hits)
    return of_class.hits[rank] / total * own.chance(of_class) if total > 0 else 0.0
