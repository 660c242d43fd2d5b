"""The tree operations in plain torch equal the drafter's growing, DraftTree and the walk."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from drafter.growing import grow_dynamic
from drafter.ranking import Noise, best_children
from engine.spec.shape import DynamicShape, ancestors_of, depths_of, signed
from engine.spec.tree import DraftTree
from engine.spec.verify import walk
from kernels.tree import reference
from tests.support.scripted_proposer import random_parents

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
class ScriptedGrower:
    """Draft logits that depend on depth and place only; otherwise what the drafter does."""

    logits: Tensor  # [depths, B, K, W]
    roots: Roots

    @property
    def num_rows(self) -> int:
        return self.logits.shape[1]

    def children(self, states: Tensor, depth: int, count: int) -> tuple[Tensor, Tensor]:
        nodes = states.shape[1]
        logits = self.logits[depth, :, :nodes].flatten(0, 1)
        zeros = torch.zeros(len(logits), dtype=torch.int64)
        found = best_children(logits, count, Noise(zeros.float(), zeros, zeros), None)
        return tuple(part.view(self.num_rows, nodes, count) for part in found)  # type: ignore[return-value]

    def forward(
        self, tokens: Tensor, features: Tensor, nodes: Tensor, masks: Tensor, depth: int
    ) -> Tensor:
        return torch.zeros(*tokens.shape, 1)


def grow(logits: Tensor, roots: Tensor, shape: DynamicShape) -> tuple[Tensor, Tensor]:
    """EAGLE-2 from the operations alone: tokens and parents of the tree."""
    scores = logits - logits.logsumexp(dim=-1, keepdim=True)  # [depths, B, K, W]
    B, k = len(roots), shape.top_k
    zero = torch.zeros(B, 1)
    found, cumulative, frontier = reference.expand(zero, scores[0, :, :1], k)
    tokens, totals = [found.flatten(1)], [cumulative.flatten(1)]
    parents, first = [torch.full((B, k), -1)], 0
    for depth in range(1, shape.max_depth):
        above = totals[-1].gather(1, frontier)
        parents.append((frontier + first).repeat_interleave(k, dim=1))
        first += totals[-1].shape[1]
        found, cumulative, frontier = reference.expand(above, scores[depth], k)
        tokens.append(found.flatten(1))
        totals.append(cumulative.flatten(1))
    candidates = [torch.cat(parts, dim=1) for parts in (tokens, parents, totals)]
    num_nodes = min(shape.num_nodes, candidates[0].shape[1] + 1)
    return reference.select(*candidates, roots, num_nodes)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("seed", range(3))
def test_growing_with_the_operations_equals_the_drafter(shape: DynamicShape, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape.max_depth, 3, shape.top_k, WIDTH, generator=generator) * 3
    roots = torch.tensor([5, 6, 7])
    grower = ScriptedGrower(logits, Roots(roots))
    tree = grow_dynamic(grower, shape, torch.zeros(3, 1))  # type: ignore[arg-type]
    tokens, parents = grow(logits, roots, shape)
    masks, depths = reference.ancestors(parents)
    assert tokens.tolist() == tree.tokens.tolist()
    assert parents.tolist() == tree.parents.tolist()
    assert masks.tolist() == tree.ancestors.tolist()
    assert depths.tolist() == tree.depths.tolist()


def test_ties_go_to_the_lower_parent_and_then_to_the_lower_token() -> None:
    scores = torch.full((1, 2, 5), -1.0)
    tokens, cumulative, frontier = reference.expand(torch.tensor([[-1.0, -1.0]]), scores, 3)
    assert tokens.tolist() == [[[0, 1, 2], [0, 1, 2]]]
    assert frontier.tolist() == [[0, 1, 2]]
    assert (cumulative == -2).all()


def test_a_head_gone_wrong_makes_no_child_better_than_its_parent() -> None:
    scores = torch.tensor([[[torch.nan, 2.0, -0.5, torch.inf, -torch.inf]]])
    tokens, cumulative, _ = reference.expand(torch.tensor([[-3.0]]), scores, 5)
    assert tokens.tolist() == [[[1, 3, 2, 0, 4]]]
    assert cumulative.tolist() == [[[-3.0, -3.0, -3.5, -torch.inf, -torch.inf]]]


def test_of_equal_scores_whole_paths_are_kept() -> None:
    parents = torch.tensor([[-1, -1, 0, 2, 1, 3]])
    tokens = torch.arange(10, 16)[None]
    got = reference.select(tokens, parents, torch.zeros(1, 6), torch.tensor([9]), 5)
    assert got[0].tolist() == [[9, 10, 11, 12, 13]]
    assert got[1].tolist() == [[-1, 0, 0, 1, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_masks_and_depths_equal_those_of_shapes(seed: int) -> None:
    rng = random.Random(seed)
    for size in (1, 2, 33, 63, 64):
        trees = [random_parents(size, rng) for _ in range(4)]
        trees.append(list(range(-1, size - 1)))  # a chain
        masks, depths = reference.ancestors(torch.tensor(trees))
        assert masks.tolist() == [[signed(mask) for mask in ancestors_of(t)] for t in trees]
        assert depths.tolist() == [list(depths_of(t)) for t in trees]


@pytest.mark.parametrize("seed", range(20))
def test_the_walk_equals_the_engines(seed: int) -> None:
    rng = random.Random(seed)
    size, B = rng.randint(1, 64), 4
    parents = torch.tensor([random_parents(size, rng) for _ in range(B)])
    generator = torch.Generator().manual_seed(seed)
    tokens, drawn = torch.randint(0, 3, (2, B, size), generator=generator).unbind()
    masks, depths = reference.ancestors(parents)
    tree = DraftTree(tokens, parents, depths, masks, torch.full((B,), size), 0)
    tree = tree.cut(torch.randint(1, size + 1, (B,), generator=generator))
    expected = walk(tree, drawn[:, : tree.tokens.shape[1]])
    drawn = drawn[:, : tree.tokens.shape[1]]
    got = reference.walk(tree.tokens, tree.parents, drawn, tree.max_depth)
    assert got[0].tolist() == expected.path.tolist()
    assert got[1].tolist() == expected.num_accepted.tolist()
    assert got[2].tolist() == expected.emitted.tolist()
