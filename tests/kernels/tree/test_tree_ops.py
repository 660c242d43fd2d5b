"""The tree operations in plain torch: alone, and used by the drafter to grow trees."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from drafter.growing import Grower, grow_dynamic
from drafter.static_levels import StaticLevels
from engine.step.shape import DynamicShape, ancestors_of, depths_of, signed
from kernels.drafting.nodes import Candidates, Frontier, LaidNodes, LevelNodes, RowPlaces
from kernels.drafting.reference import grow_level, lay_levels
from kernels.ops import Ops
from kernels.sampling.rank.ranking import NodeDraws, Ranked
from kernels.sampling.settings import DrawSettings
from kernels.tree import reference
from tests.support.drafts.scripted_proposer import random_parents
from tests.support.machine.pretend_device import DEVICE, PretendDevice

SHAPES = [
    DynamicShape("eagle2", 26, 5, 6),
    DynamicShape("wide", 64, 2, 40),
    DynamicShape("all", 13, 4, 3),
    DynamicShape("chain", 4, 3, 1),
    DynamicShape("leaves", 5, 1, 8),
]
WIDTH = 100


@dataclass
class Roots:
    tokens: Tensor


@dataclass
class Context:
    ops: Ops


@dataclass
class ScriptedGrower:
    """Draft logits that depend only on depth and place; otherwise like the drafter."""

    logits: Tensor  # [depths, B, K, W]
    roots: Roots
    sizes: Tensor
    ctx: Context
    levels: StaticLevels

    selected = Grower.selected

    @property
    def num_rows(self) -> int:
        return self.logits.shape[1]

    def lay(self, nodes: LevelNodes) -> LaidNodes:
        room = torch.full_like(self.sizes, 64)
        tables = torch.zeros(self.num_rows, 8, dtype=torch.int32)
        return lay_levels(nodes, RowPlaces(self.sizes, room, tables, 16, 0, 999))

    def children(self, states: Tensor, depth: int, count: int, *, scored: bool) -> Ranked:
        nodes = states.shape[1]
        logits = self.logits[depth, :, :nodes].flatten(0, 1)
        zeros = torch.zeros(self.num_rows, dtype=torch.int64)
        greedy = DrawSettings(zeros.float(), zeros, zeros, any_sampled=False)
        found = self.ctx.ops.rank_drafts(logits, NodeDraws(greedy, nodes, 1), None, count, scored)
        assert found.scores is not None
        shape = (self.num_rows, nodes, count)
        return Ranked(found.tokens.view(shape), found.scores.view(shape))

    def forward(self, tokens: Tensor, features: Tensor, level: LaidNodes, above: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 1)


@dataclass
class Node:
    """A candidate of the oracle: `path` holds the tokens after the root."""

    path: tuple[int, ...]
    score: float
    parent: Node | None


def grow(scores: Tensor, root: int, shape: DynamicShape) -> tuple[list[int], list[int]]:
    """EAGLE-2 for one row, one node at a time: tokens and parents. `scores` [depths, K, W]."""
    frontier: list[Node | None] = [None]
    found: list[Node] = []
    for depth in range(shape.max_depth):
        children = []
        for place, parent in enumerate(frontier):
            row = scores[depth, place]
            above = torch.tensor(0.0 if parent is None else parent.score)
            best = row.topk(shape.top_k)
            for token, score in zip(best.indices.tolist(), (above + best.values), strict=True):
                path = (*(parent.path if parent else ()), token)
                children.append(Node(path, float(score), parent))
        found += children
        frontier = sorted(children, key=lambda node: -node.score)[: shape.top_k]
    kept = sorted(range(len(found)), key=lambda at: -found[at].score)[: shape.num_nodes - 1]
    nodes = [found[at] for at in sorted(kept)]
    tokens = [root, *(node.path[-1] for node in nodes)]
    places = {id(node): 1 + at for at, node in enumerate(nodes)}
    return tokens, [-1, *(places[id(node.parent)] if node.parent else 0 for node in nodes)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("seed", range(3))
def test_the_drafter_grows_what_growing_node_by_node_gives(
    reference_ops: Ops, shape: DynamicShape, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape.max_depth, 3, shape.top_k, WIDTH, generator=generator) * 3
    roots = torch.tensor([5, 6, 7])
    room, levels = torch.full_like(roots, shape.num_nodes), StaticLevels(roots.device)
    grower = ScriptedGrower(logits, Roots(roots), room, Context(reference_ops), levels)
    tree = grow_dynamic(shape, grower, torch.zeros(3, 1))  # type: ignore[arg-type]
    scores = logits - logits.logsumexp(dim=-1, keepdim=True)  # [depths, B, K, W]
    for row, root in enumerate(roots.tolist()):
        tokens, parents = grow(scores[:, row], root, shape)
        assert tree.tokens[row].tolist() == tokens
        assert tree.parents[row].tolist() == parents
        assert tree.ancestors[row].tolist() == [signed(mask) for mask in ancestors_of(parents)]
        assert tree.depths[row].tolist() == list(depths_of(parents))


def children_of(frontier: list[float], scores: Tensor) -> tuple[Candidates, Frontier]:
    """Candidates of one row in which every node has children 0, 1, ..., and the next frontier."""
    (K, k), row = scores.shape, torch.arange(len(frontier))[None]
    above = Frontier(row, torch.tensor([frontier]), 1 << row, row + 5, row[0])
    tokens = torch.arange(k).expand(1, K, k)
    integers, floats = torch.zeros(2, 1, K * k, dtype=torch.int64), torch.zeros(1, K * k)
    room = Candidates(integers[0], integers[1], floats)
    grown = grow_level(tokens, scores[None], above, torch.zeros(k).long(), room, 0)
    assert grown is not None
    return room, grown


def test_ties_go_to_the_lower_parent_and_then_to_the_lower_token() -> None:
    room, frontier = children_of([-1.0, -1.0], torch.full((2, 3), -1.0))
    assert (room.scores == -2).all()
    assert room.parents.tolist() == [[5, 5, 5, 6, 6, 6]]
    assert frontier.places.tolist() == [[0, 1, 2]]
    assert frontier.feature_of.tolist() == [0, 0, 0]


def test_a_head_gone_wrong_makes_no_child_better_than_its_parent() -> None:
    wrong = torch.tensor([[torch.nan, 2.0, -0.5, torch.inf, -torch.inf]])
    room, frontier = children_of([-3.0], wrong)
    assert room.scores.tolist() == [[-torch.inf, -3.0, -3.5, -3.0, -torch.inf]]
    assert frontier.tokens.tolist() == [[1, 3, 2, 0, 4]]


def test_of_equal_scores_whole_paths_are_kept() -> None:
    parents = torch.tensor([[-1, -1, 0, 2, 1, 3]])
    tokens = torch.arange(10, 16)[None]
    roots, limits = torch.tensor([9]), torch.tensor([5])
    got = reference.select(tokens, parents, torch.zeros(1, 6), roots, limits, 5)
    assert got[0].tolist() == [[9, 10, 11, 12, 13]]
    assert got[1].tolist() == [[-1, 0, 0, 1, 3]]


def random_candidates(B: int, C: int, ties: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, scores [B, C] and root tokens [B]; no child scores above its parent."""
    rng = random.Random(C)
    parents = torch.tensor([random_parents(C + 1, rng)[1:] for _ in range(B)]) - 1  # -1: the root
    scores = -torch.randn(B, C, generator=torch.Generator().manual_seed(C)).abs()
    scores = scores.round() if ties else scores
    for child in range(C):
        above = parents[:, child]
        total = scores.gather(1, above.clamp(min=0)[:, None])[:, 0]
        scores[:, child] += torch.where(above < 0, 0.0, total)
    return torch.arange(B * C).view(B, C), parents, scores, 10**6 + torch.arange(B)


def tree_of_the_best(
    tokens: list[int], parents: list[int], scores: list[float], root: int, size: int
) -> tuple[list[int], list[int]]:
    """Take the best candidate repeatedly, then number the taken ones."""
    taken: set[int] = set()
    while len(taken) < size - 1:
        free = [at for at in range(len(tokens)) if at not in taken]
        taken.add(max(free, key=lambda at: (scores[at], -at)))
    order = sorted(taken)
    above = [0 if parents[at] < 0 else 1 + order.index(parents[at]) for at in order]
    return [root, *(tokens[at] for at in order)], [-1, *above]


@pytest.mark.parametrize(("C", "num_nodes"), [(1, 2), (7, 4), (12, 13), (40, 16), (5, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_each_row_keeps_its_own_number_of_nodes(C: int, num_nodes: int, ties: bool) -> None:
    """From the root alone to more than fit; the root stays even at limit 0."""
    limits = [0, 1, 2, num_nodes // 2, num_nodes - 1, num_nodes, num_nodes + 1, 10**9]
    candidates = random_candidates(len(limits), C, ties)
    got = reference.select(*candidates, torch.tensor(limits), num_nodes)
    for row, limit in enumerate(limits):
        size = max(1, min(limit, num_nodes))
        own = tree_of_the_best(*(part[row].tolist() for part in candidates), size)
        padded = [part + [-1] * (num_nodes - size) for part in own]
        assert [part[row].tolist() for part in got] == padded
        alone = [part[row : row + 1] for part in candidates]
        same = reference.select(*alone, torch.tensor([size]), size)
        assert [part[0].tolist() for part in same] == [*own]


def test_a_row_is_cut_to_its_limit_without_a_wait_for_the_device() -> None:
    candidates, limits = random_candidates(3, 20, False), torch.tensor([4, 0, 9])
    expected = reference.select(*candidates, limits, 8)
    with PretendDevice() as device:
        far = [part.to(DEVICE) for part in (*candidates, limits)]
        uploads = device.uploads
        got = reference.select(*far, 8)
        assert (device.waits, device.downloads, device.uploads) == ([], 0, uploads)
    assert [part.near.tolist() for part in got] == [part.tolist() for part in expected]


@pytest.mark.parametrize("seed", range(5))
def test_masks_and_depths_equal_those_of_shapes(seed: int) -> None:
    rng = random.Random(seed)
    for size in (1, 2, 33, 63, 64):
        trees = [random_parents(size, rng) for _ in range(4)]
        trees.append(list(range(-1, size - 1)))  # a chain
        masks, depths = reference.ancestors(torch.tensor(trees))
        assert masks.tolist() == [[signed(mask) for mask in ancestors_of(t)] for t in trees]
        assert depths.tolist() == [list(depths_of(t)) for t in trees]


def test_native_walks_equal_the_reference(native_ops: Ops) -> None:
    luck = random.Random(3)
    for num_nodes in (1, 2, 7, 64):
        parents = [random_parents(num_nodes, luck) for _ in range(5)]
        parents[1] = [*parents[1][:1], *[-1] * (num_nodes - 1)]  # only the root is in use
        tokens, drawn = (torch.randint(-1, 3, (5, num_nodes)) for _ in range(2))
        depth = max(max(depths_of(row)) for row in parents)
        args = (tokens, torch.tensor(parents), drawn, depth)
        for got, expected in zip(native_ops.tree_walk(*args), reference.walk(*args), strict=True):
            assert torch.equal(got, expected)
