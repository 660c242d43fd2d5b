"""Static tree shapes by level, as tensors on the drafting device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.step.shape import StaticShape, signed
from engine.step.tree import DraftTree

# A slice, where places follow each other: it needs no kernel
Places = slice | Tensor


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth that have children; only these go through the head."""

    nodes: Tensor  # [n] int64
    masks: Tensor  # [n] int64, of their ancestors
    nodes_at: Places  # the nodes, to index with
    above_at: Places  # their parents; the root counts as its own parent
    most_children: int


@dataclass(frozen=True, slots=True)
class Levels:
    """A static shape."""

    parents: Tensor  # [N] int64, and so are the next two
    depths: Tensor
    masks: Tensor  # of ancestors
    levels: tuple[Level, ...]  # by depth

    def tree(self, tokens: Tensor) -> DraftTree:
        """Trees of this shape with these tokens, [B, N]."""
        return DraftTree(
            tokens=tokens,
            parents=self.parents.expand_as(tokens),
            depths=self.depths.expand_as(tokens),
            ancestors=self.masks.expand_as(tokens),
            sizes=torch.full_like(tokens[:, 0], tokens.shape[1]),
            max_depth=len(self.levels),
        )


class Children(NamedTuple):
    """The m nodes of a depth, and the candidate that each takes."""

    nodes: Places  # m
    candidates: Places  # m, indices among the n * width candidates of the level above


class StaticLevels:
    """The levels of the shapes that one proposer grows. They are made at the first use of a shape
    and never dropped: captured steps hold the addresses of these tensors. So the proposer owns
    them, and lives as long as its steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._levels: dict[StaticShape, Levels] = {}
        self._children: dict[tuple[StaticShape, int, int], Children] = {}
        self._starts: dict[tuple[int, int], Tensor] = {}

    def of(self, shape: StaticShape) -> Levels:
        if shape not in self._levels:
            self._levels[shape] = _levels_of(shape, self._device)
        return self._levels[shape]

    def children(self, shape: StaticShape, depth: int, width: int) -> Children:
        """Which child takes which candidate, if each node of a depth has `width` candidates."""
        key = shape, depth, width
        if key not in self._children:
            self._children[key] = _children_of(shape, depth, width, self._device)
        return self._children[key]

    def starts(self, num_rows: int, per_row: int) -> Tensor:
        """[num_rows + 1] int32: where the nodes of each row begin, if each has `per_row`."""
        key = num_rows, per_row
        if key not in self._starts:
            starts = torch.arange(num_rows + 1, dtype=torch.int32) * per_row
            self._starts[key] = starts.to(self._device)
        return self._starts[key]


def _levels_of(shape: StaticShape, device: torch.device) -> Levels:
    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    every_mask = [signed(mask) for mask in shape.ancestors]
    levels = []
    for depth in range(shape.max_depth):
        nodes = _with_children(shape, depth)
        above = [max(shape.parents[node], 0) for node in nodes]
        most = max(shape.parents.count(node) for node in nodes)
        levels.append(
            Level(
                nodes=integers(nodes),
                masks=integers([every_mask[node] for node in nodes]),
                nodes_at=_places(nodes, device),
                above_at=_places(above, device),
                most_children=most,
            )
        )
    return Levels(
        integers(list(shape.parents)),
        integers(list(shape.depths)),
        integers(every_mask),
        tuple(levels),
    )


def _places(numbers: list[int], device: torch.device) -> Places:
    if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return torch.tensor(numbers, dtype=torch.int64).to(device)


def _children_of(shape: StaticShape, depth: int, width: int, device: torch.device) -> Children:
    nodes, candidates = [], []
    for place, parent in enumerate(_with_children(shape, depth)):
        children = [node for node, above in enumerate(shape.parents) if above == parent]
        for rank, child in enumerate(children[:width]):
            nodes.append(child)
            candidates.append(place * width + rank)
    return Children(_places(nodes, device), _places(candidates, device))


def _with_children(shape: StaticShape, depth: int) -> list[int]:
    inner = set(shape.parents)
    return [node for node, at in enumerate(shape.depths) if at == depth and node in inner]
