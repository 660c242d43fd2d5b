"""Static tree shapes by level, as tensors on the drafting device; made once per shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.step.shape import StaticShape, signed


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth that have children; only these go through the head."""

    nodes: Tensor  # [n] int64
    above: Tensor  # [n] int64, their parents; the root counts as its own parent
    most_children: int


@dataclass(frozen=True, slots=True)
class Levels:
    """A static shape."""

    parents: Tensor  # [N] int64, and so are the next two
    depths: Tensor
    masks: Tensor  # of ancestors
    levels: tuple[Level, ...]  # by depth


@functools.lru_cache(maxsize=64)
def levels_of(shape: StaticShape, device: torch.device) -> Levels:
    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    levels = []
    for depth in range(shape.max_depth):
        nodes = _with_children(shape, depth)
        above = [max(shape.parents[node], 0) for node in nodes]
        most = max(shape.parents.count(node) for node in nodes)
        levels.append(Level(integers(nodes), integers(above), most))
    masks = [signed(mask) for mask in shape.ancestors]
    return Levels(
        integers(list(shape.parents)), integers(list(shape.depths)), integers(masks), tuple(levels)
    )


@functools.lru_cache(maxsize=256)
def children_of(
    shape: StaticShape, depth: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which child takes which candidate; each of the level's n nodes has `width` candidates.

    Returns:
        nodes: [m] int64, of depth `depth` + 1.
        candidates: [m] int64, index among the n * width candidates of the level.
    """
    nodes, candidates = [], []
    for place, parent in enumerate(_with_children(shape, depth)):
        children = [node for node, above in enumerate(shape.parents) if above == parent]
        for rank, child in enumerate(children[:width]):
            nodes.append(child)
            candidates.append(place * width + rank)
    return torch.tensor(nodes).to(device), torch.tensor(candidates).to(device)


def _with_children(shape: StaticShape, depth: int) -> list[int]:
    inner = set(shape.parents)
    return [node for node, at in enumerate(shape.depths) if at == depth and node in inner]
