"""How likely draft tokens are accepted: by class of requests, depth and rank, and by row."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.step.shape import StaticShape

PRIOR = (0.55, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)  # chance of the r-th child, untried
DEEPER = 0.95  # prior chance of a child one level deeper, relative to this level
PRIOR_TREES = 3.0  # observations that a prior stands for
LEAST_TREES = 2.0  # observations of a depth before one looks deeper
MOST_TREES = 150.0  # newest observations of a class that count
FADING = 0.995  # from step to step, of what is known of a class; so what failed is tried again
ROW_TREES = 2.5  # own observations of a row that its class stands for
ROW_FADING = 0.97
MOST_CHANCE = 0.98


@dataclass(slots=True)
class Depth:
    """Nodes of one depth in one class: how often they had an r-th child, and it was accepted."""

    seen: list[float] = field(default_factory=lambda: [0.0] * len(PRIOR))
    hits: list[float] = field(default_factory=lambda: [0.0] * len(PRIOR))

    def chances(self, prior: Sequence[float]) -> list[float]:
        """Of the children, by rank."""
        return [
            (PRIOR_TREES * chance + hits) / (PRIOR_TREES + seen)
            for chance, seen, hits in zip(prior, self.seen, self.hits, strict=True)
        ]

    def observe(self, num_children: int, rank: int | None) -> None:
        """`rank` of the accepted child; None: no child was accepted."""
        for at in range(min(num_children, len(PRIOR))):
            self.seen[at] += 1
            self.hits[at] += at == rank
        if self.seen[0] > MOST_TREES:
            self.fade(MOST_TREES / self.seen[0])

    def fade(self, kept: float) -> None:
        self.seen = [kept * seen for seen in self.seen]
        self.hits = [kept * hits for hits in self.hits]


@dataclass(slots=True)
class Row:
    """Nodes of one row that had children: how often one was accepted, and how often that would have
    been in its class."""

    seen: float = 0.0
    hits: float = 0.0
    expected: float = 0.0

    def factor(self, chance: float) -> float:
        """The row's chance of an accepted child relative to its class, for a node where the class
        has this one."""
        usual = ROW_TREES * chance
        return min(MOST_CHANCE / chance, (usual + self.hits) / (usual + self.expected))

    def observe(self, chance: float, *, accepted: bool) -> None:
        self.seen += 1
        self.hits += accepted
        self.expected += chance

    def fade(self, kept: float) -> None:
        self.seen *= kept
        self.hits *= kept
        self.expected *= kept


UNSEEN = Row()


@dataclass(slots=True)
class Acceptance:
    """Running estimates for the rows of one engine."""

    _classes: dict[bool, list[Depth]] = field(default_factory=lambda: {False: [], True: []})
    _rows: dict[int, Row] = field(default_factory=dict)  # by line
    _chances: dict[bool, list[list[float]]] = field(default_factory=dict)  # of each class, if known
    _num_passed: int = 0  # steps since all were faded

    def reach(
        self, line: int, shape: StaticShape, *, sampled: bool, hope: float = 0.0
    ) -> list[float]:
        """The chance of every draft node of `shape` to be accepted, those of its ancestors
        included; the root is left out. `hope`: by how many standard errors chances are taken to be
        better than they seem."""
        self._catch_up()
        row, families = self._rows.get(line, UNSEEN), _families(shape)
        by_depth = self._of_class(families[-1].depth, sampled=sampled) if families else []
        depths = self._classes[sampled]
        found = [1.0] * shape.num_nodes
        for parent, depth, children in families:
            chances = by_depth[depth]
            total = sum(chances[: len(children)])
            if total == 0:
                found[children[0] :] = [0.0] * (len(found) - children[0])
                break
            own = total * row.factor(total)
            if hope:
                trees = PRIOR_TREES + depths[depth].seen[0]
                variance = own * (1 - own) * (1 / (ROW_TREES + row.seen) + 1 / trees)
                own = min(MOST_CHANCE, own + hope * math.sqrt(variance))
            scale = found[parent] * own / total
            for rank, child in enumerate(children):
                found[child] = scale * chances[rank] if rank < len(chances) else 0.0
        return found[1:]

    def observe(
        self, line: int, shape: StaticShape, num_nodes: int, path: Sequence[int], *, sampled: bool
    ) -> None:
        """Learn from a tree of the first `num_nodes` nodes of `shape`. `path`: the accepted nodes
        without the root."""
        self._catch_up()
        node, row = 0, self._rows.setdefault(line, Row())
        families = {family.parent: family for family in _families(shape)}
        for child in (*path, None):
            family = families.get(node)
            children = [n for n in family.children if n < num_nodes] if family else []
            if family is None or not children:
                break
            chances = self._of_class(family.depth, sampled=sampled)[family.depth]
            row.observe(sum(chances[: len(children)]), accepted=child is not None)
            rank = None if child is None else children.index(child)
            self._classes[sampled][family.depth].observe(len(children), rank)
            if child is None:
                break
            node = child
        self._chances.pop(sampled, None)

    def fade(self) -> None:
        """A step has passed: trust all observations less."""
        self._num_passed += 1

    def _catch_up(self) -> None:
        """Fade by all steps that have passed: few steps look at the chances."""
        passed, self._num_passed = self._num_passed, 0
        if passed == 0:
            return
        for row in self._rows.values():
            row.fade(ROW_FADING**passed)
        for depths in self._classes.values():
            for depth in depths:
                depth.fade(FADING**passed)
        self._chances.clear()

    def forget(self, line: int) -> None:
        """The line has a new sequence."""
        self._catch_up()
        self._rows.pop(line, None)

    def _of_class(self, depth: int, *, sampled: bool) -> list[list[float]]:
        """The chances of a class, by depth and rank, at least down to `depth`."""
        found = self._chances.setdefault(sampled, [])
        depths = self._classes[sampled]
        while len(found) <= depth:
            if len(depths) == len(found):
                depths.append(Depth())
            found.append(depths[len(found)].chances(_prior(depths, found)))
        return found


def _prior(depths: Sequence[Depth], above: Sequence[Sequence[float]]) -> Sequence[float]:
    """The chances at a depth as far as one knows from those above it, by rank."""
    if not above:
        return PRIOR
    factor = DEEPER if depths[len(above) - 1].seen[0] >= LEAST_TREES else 0.0
    return [factor * chance for chance in above[-1]]


class Family(NamedTuple):
    """A node of a shape that has children."""

    parent: int
    depth: int  # of the parent
    children: tuple[int, ...]


@functools.cache
def _families(shape: StaticShape) -> tuple[Family, ...]:
    """In order of depth."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(shape.parents[1:], start=1):
        children.setdefault(parent, []).append(node)
    found = [Family(node, shape.depths[node], tuple(own)) for node, own in children.items()]
    return tuple(sorted(found, key=lambda family: family.depth))
