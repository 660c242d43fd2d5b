"""Static tree shapes by level, as tensors on the drafting device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.step.shape import DynamicShape, StaticShape, signed
from engine.step.tree import DraftTree
from kernels.drafting.nodes import LevelNodes

# A slice, where places follow each other: it needs no kernel
Places = slice | Tensor


@dataclass(frozen=True, slots=True)
class Level:
    """The n nodes of one depth that have children; only these go through the head."""

    first: int  # the first of them among all such nodes after the root
    width: int  # n
    above: Places  # their parents among such nodes of the level above; the root counts as its own
    most_children: int


@dataclass(frozen=True, slots=True)
class Levels:
    """A static shape."""

    parents: Tensor  # [N] int64, and so are the next two
    depths: Tensor
    masks: Tensor  # of ancestors
    nodes: Tensor  # 0, 1, ...
    inner: LevelNodes  # those with children, without the root
    levels: tuple[Level, ...]  # by depth

    def tree(self, tokens: Tensor, sizes: Tensor) -> DraftTree:
        """The first `sizes` [B] nodes of trees of this shape with these tokens, [B, N]."""
        return DraftTree(
            tokens=tokens,
            parents=torch.where(self.nodes < sizes[:, None], self.parents, -1),
            depths=self.depths.expand_as(tokens),
            ancestors=self.masks.expand_as(tokens),
            sizes=sizes,
            max_depth=len(self.levels),
        )


class StaticLevels:
    """The levels of the shapes that one proposer grows. They are made at the first use of a shape
    and never dropped: captured steps hold the addresses of these tensors. So the proposer owns
    them, and lives as long as its steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._levels: dict[StaticShape, Levels] = {}
        self._frontiers: dict[DynamicShape, LevelNodes] = {}
        self._inner: dict[tuple[StaticShape, int, int], Places] = {}
        self._orders: dict[tuple[StaticShape, tuple[int, ...]], Places] = {}
        self._starts: dict[tuple[int, int], Tensor] = {}

    def of(self, shape: StaticShape) -> Levels:
        if shape not in self._levels:
            self._levels[shape] = _levels_of(shape, self._device)
        return self._levels[shape]

    def frontiers(self, shape: DynamicShape) -> LevelNodes:
        """The frontiers of a dynamic shape. The mask of a node holds only its own bit."""
        if shape not in self._frontiers:
            depths = [depth for depth in range(1, shape.max_depth) for _ in range(shape.top_k)]
            nodes = list(range(1, 1 + len(depths)))
            masks = [1 << node for node in nodes]
            self._frontiers[shape] = _level_nodes(nodes, depths, masks, self._device)
        return self._frontiers[shape]

    def inner(self, shape: StaticShape, depth: int, width: int) -> Places:
        """Which candidates the nodes of a depth that have children take, if each such node of the
        depth above has `width` candidates."""
        key = shape, depth, width
        if key not in self._inner:
            nodes = _with_children(shape, depth)
            taken = [_candidate_of(shape, node, width) for node in nodes]
            self._inner[key] = _places(taken, self._device)
        return self._inner[key]

    def order(self, shape: StaticShape, widths: tuple[int, ...]) -> Places:
        """Which token each node takes, of the root and then, depth by depth, all candidates after
        nodes that have children: `widths` of each."""
        key = shape, widths
        if key not in self._orders:
            self._orders[key] = _places(_order_of(shape, widths), self._device)
        return self._orders[key]

    def starts(self, num_rows: int, per_row: int) -> Tensor:
        """[num_rows + 1] int32: where the nodes of each row begin, if each has `per_row`."""
        key = num_rows, per_row
        if key not in self._starts:
            starts = torch.arange(num_rows + 1, dtype=torch.int32) * per_row
            self._starts[key] = starts.to(self._device)
        return self._starts[key]


def _levels_of(shape: StaticShape, device: torch.device) -> Levels:
    every_mask = [signed(mask) for mask in shape.ancestors]
    levels, inner, above = [], list[int](), [0]
    for depth in range(shape.max_depth):
        nodes = _with_children(shape, depth)
        levels.append(
            Level(
                first=len(inner),
                width=len(nodes),
                above=_places([above.index(max(shape.parents[n], 0)) for n in nodes], device),
                most_children=max(shape.parents.count(node) for node in nodes),
            )
        )
        inner, above = inner + (nodes if depth else []), nodes
    depths = [shape.depths[node] for node in inner]
    masks = [shape.ancestors[node] for node in inner]
    return Levels(
        _integers(list(shape.parents), device),
        _integers(list(shape.depths), device),
        _integers(every_mask, device),
        _integers(list(range(shape.num_nodes)), device),
        _level_nodes(inner, depths, masks, device),
        tuple(levels),
    )


def _level_nodes(
    nodes: list[int], depths: list[int], masks: list[int], device: torch.device
) -> LevelNodes:
    """Nodes in the order of their depths."""
    firsts = [depths.index(depth) for depth in depths]
    widths = [depths.count(depth) for depth in depths]
    columns = (nodes, depths, [signed(mask) for mask in masks], firsts, widths)
    return LevelNodes(*(_integers(column, device) for column in columns))


def _integers(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)


def _places(numbers: list[int], device: torch.device) -> Places:
    if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return _integers(numbers, device)


def _candidate_of(shape: StaticShape, node: int, width: int) -> int:
    """Which of the candidates after the depth above a node takes: siblings take the best in order,
    and the last one again if there are too few."""
    parent = shape.parents[node]
    rank = shape.parents[:node].count(parent)
    place = _with_children(shape, shape.depths[parent]).index(parent)
    return place * width + min(rank, width - 1)


def _order_of(shape: StaticShape, widths: tuple[int, ...]) -> list[int]:
    firsts = [1]  # of the candidates at each depth
    for depth, width in enumerate(widths):
        firsts.append(firsts[-1] + len(_with_children(shape, depth)) * width)
    order = [0]
    for node in range(1, shape.num_nodes):
        above = shape.depths[node] - 1
        order.append(firsts[above] + _candidate_of(shape, node, widths[above]))
    return order


def _with_children(shape: StaticShape, depth: int) -> list[int]:
    inner = set(shape.parents)
    return [node for node, at in enumerate(shape.depths) if at == depth and node in inner]
