"""Trees from a head that drafts in parallel: it gives one distribution for each depth, whatever the
tokens before, so a path is as likely as the product of its tokens' probabilities (arXiv:2602.06036
and 2602.01469 draft chains; a chain takes the best token of each). No function here waits for the
device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.growing import Grower
from drafter.heads.interface import ParallelHead
from engine.step.shape import DynamicShape, StaticShape, TreeShape
from engine.step.tree import DraftTree
from kernels.drafting.nodes import Candidates

MOST_PATHS = 1024  # that a dynamic tree chooses among

Path = tuple[int, ...]  # the rank of each token among the candidates of its depth


@dataclass(frozen=True, slots=True)
class Paths:
    """Paths as tensors on the drafting device, parents before children."""

    last: Tensor  # [C] int64 candidate of each path's end: (depth - 1) * width + rank
    parents: Tensor  # [C] int64 path without its end, -1 for one of length 1
    steps: Tensor  # [D, C] int64 candidate at each depth; D * width beyond the path's end


class PathTables:
    """The paths of the shapes that one proposer grows. They are made at the first use of a shape
    and never dropped, since captured steps hold the addresses of these tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._static: dict[StaticShape, Tensor] = {}
        self._dynamic: dict[DynamicShape, Paths] = {}

    def static(self, shape: StaticShape) -> Tensor:
        """[N - 1] int64: the candidate that each node but the root takes, in a tree in which a
        depth has as many candidates as the most children of any node."""
        if shape not in self._static:
            self._static[shape] = torch.tensor(list(_ranks(shape))).to(self._device)
        return self._static[shape]

    def dynamic(self, shape: DynamicShape) -> Paths:
        """The paths among which the best-first tree of `shape` lies."""
        if shape not in self._dynamic:
            paths = likeliest_paths(shape.num_nodes, shape.max_depth, shape.top_k)
            self._dynamic[shape] = _tables(paths, shape, self._device)
        return self._dynamic[shape]


def _ranks(shape: StaticShape) -> Iterator[int]:
    """Siblings take the candidates of their depth in order."""
    for node in range(1, shape.num_nodes):
        above = shape.parents[node]
        rank = shape.parents[1:node].count(above)
        yield (shape.depths[node] - 1) * shape.most_children + rank


def likeliest_paths(num_nodes: int, max_depth: int, top_k: int) -> list[Path]:
    """All paths that can be among the `num_nodes` - 1 likeliest, whatever the probabilities; by
    length, then in order. If that are more than `MOST_PATHS`, those that can be among fewer.

    At least as likely as a path are all whose ranks are nowhere larger, and all their beginnings:
    so many must be in the tree before it.
    """
    for room in range(num_nodes - 1, 0, -1):
        found = list(_below(room, max_depth, top_k))
        if len(found) <= MOST_PATHS or room == 1:
            break
    return sorted(found, key=lambda path: (len(path), path))


def _below(room: int, max_depth: int, top_k: int) -> Iterator[Path]:
    """Paths with at most `room` paths at least as likely, themselves included."""

    def grown(path: Path, product: int, total: int) -> Iterator[Path]:
        for rank in range(top_k if len(path) < max_depth else 0):
            at_least = total + product * (rank + 1)
            if at_least > room:
                return
            yield (*path, rank)
            yield from grown((*path, rank), product * (rank + 1), at_least)

    return grown((), 1, 0)


def _tables(paths: list[Path], shape: DynamicShape, device: torch.device) -> Paths:
    width, number = shape.top_k, {path: place for place, path in enumerate(paths)}
    nothing = shape.max_depth * width

    def candidate(path: Path, depth: int) -> int:
        return depth * width + path[depth] if depth < len(path) else nothing

    def integers(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    return Paths(
        last=integers([candidate(path, len(path) - 1) for path in paths]),
        parents=integers([number.get(path[:-1], -1) for path in paths]),
        steps=integers([[candidate(p, depth) for p in paths] for depth in range(shape.max_depth)]),
    )


@dataclass(frozen=True, slots=True)
class Marginals:
    """The distributions of all depths, as states of the head."""

    grower: Grower
    head: ParallelHead
    root_states: Tensor  # [B, H]

    def candidates(self, depth: int, width: int) -> tuple[Tensor, Tensor | None]:
        """The best tokens of `depth` depths [B, depth, width], and their scores, if there are
        several."""
        grower = self.grower
        states = grower.all_at_once(self.head, self.root_states, depth)
        draws = grower.one_after_another(depth)
        best = grower.ranked(states, draws, width, scored=width > 1)
        return best.tokens, best.scores


@functools.singledispatch
def grow_at_once(shape: TreeShape, marginals: Marginals, tables: PathTables) -> DraftTree:  # noqa: ARG001
    """Trees of one shape for all rows. As with `growing.grow`, the first `max_nodes` nodes of a row
    are a tree, too."""
    raise TypeError(f"no way to grow a {type(shape).__name__}")


@grow_at_once.register
def grow_static(shape: StaticShape, marginals: Marginals, tables: PathTables) -> DraftTree:
    """Fill a fixed shape: nodes of one depth have the same children, the best of the next one."""
    grower = marginals.grower
    plan, roots = grower.levels.of(shape), grower.roots.tokens[:, None]
    tokens = roots
    if shape.max_depth:
        found, _ = marginals.candidates(shape.max_depth, shape.most_children)
        tokens = torch.cat((roots, found.flatten(1)[:, tables.static(shape)]), dim=1)
    return plan.tree(tokens, grower.sizes)


@grow_at_once.register
def grow_dynamic(shape: DynamicShape, marginals: Marginals, tables: PathTables) -> DraftTree:
    """Best-first: the likeliest paths by the product of their tokens' probabilities."""
    grower, paths = marginals.grower, tables.dynamic(shape)
    found, local = marginals.candidates(shape.max_depth, shape.top_k)  # [B, D, k]
    if local is None:
        local = torch.zeros_like(found, dtype=torch.float32)
    scores = _path_scores(local, paths)
    parents = paths.parents.expand(len(scores), -1).contiguous()
    candidates = Candidates(found.flatten(1)[:, paths.last], parents, scores)
    return grower.selected(shape, candidates)


def _path_scores(local: Tensor, paths: Paths) -> Tensor:
    """[B, D, k] log-probabilities -> [B, C] of the paths. Summed depth by depth, so that none
    scores above its own beginning."""
    sound = torch.where(local.isnan(), -torch.inf, local).clamp(max=0.0).flatten(1)
    padded = torch.nn.functional.pad(sound, (0, 1))  # 0 beyond a path's end
    scores = padded[:, paths.steps[0]]
    for step in paths.steps[1:]:
        scores = scores + padded[:, step]
    return scores.contiguous()
