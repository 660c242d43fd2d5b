"""Draft trees as tensors: from a shape, cut, mixed; and the walk against one in Python."""

from __future__ import annotations

import random

import pytest
import torch

from engine.speculation.verify import walk
from engine.step.shape import StaticShape, ancestors_of, chain, signed
from engine.step.tree import DraftTree
from kernels.ops import Ops
from tests.support.scripted_proposer import random_parents, random_shape, tree_of

HAND = StaticShape("hand", (-1, 0, 0, 1, 3, 2))


def same(tree: DraftTree, other: DraftTree) -> None:
    """Equal in all that anybody may look at."""
    inside = torch.arange(tree.tokens.shape[1]) < tree.sizes[:, None]
    for part in ("tokens", "parents", "depths"):
        assert torch.equal(getattr(tree, part), getattr(other, part)), part
    assert torch.equal(tree.ancestors[inside], other.ancestors[inside])
    assert torch.equal(tree.sizes, other.sizes)
    assert tree.max_depth == other.max_depth


@pytest.mark.parametrize("sizes", [[6, 6], [4, 2], [1, 5], [1, 1]])
def test_a_shape_is_filled_and_cut_row_by_row(sizes: list[int]) -> None:
    tokens = torch.arange(12).view(2, 6) + 50
    tree = DraftTree.of_shape(HAND, tokens, torch.tensor(sizes))
    rows = [(HAND.parents[:size], tokens[row, :size].tolist()) for row, size in enumerate(sizes)]
    same(tree, tree_of(rows))


def test_the_last_of_64_nodes_has_the_sign_bit() -> None:
    shape = chain(63)
    tree = DraftTree.of_shape(shape, torch.zeros(1, 64, dtype=torch.int64), torch.tensor([64]))
    assert tree.ancestors[0, 63] == -1
    assert tree.ancestors[0, 62] == 2**63 - 1
    assert tree.max_depth == 63


@pytest.mark.parametrize("seed", range(8))
def test_cutting_keeps_the_first_nodes(seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(5):
        parents = random_parents(rng.randint(1, 64), rng)
        rows.append((parents, [rng.randrange(9) for _ in parents]))
    sizes = [rng.randint(1, len(parents)) for parents, _ in rows]
    kept = [(parents[:n], tokens[:n]) for (parents, tokens), n in zip(rows, sizes, strict=True)]
    same(tree_of(rows).cut(torch.tensor(sizes)), tree_of(kept))


def test_roots_are_trees_of_one_node() -> None:
    same(DraftTree.roots(torch.tensor([4, 9])), tree_of([([-1], [4]), ([-1], [9])]))


def test_rows_can_be_replaced() -> None:
    wide, narrow = ([-1, 0, 0, 1], [1, 2, 3, 4]), ([-1, 0], [5, 6])
    roots = DraftTree.roots(torch.tensor([7, 8, 9]))
    mixed = roots.with_rows(torch.tensor([2, 0]), tree_of([wide, narrow]))
    same(mixed, tree_of([narrow, ([-1], [8]), wide]))
    same(mixed.with_rows(torch.tensor([2]), tree_of([narrow])).cut(torch.tensor([2, 1, 2])),
         tree_of([narrow, ([-1], [8]), narrow]))  # fmt: skip


def python_walk(parents: list[int], tokens: list[int], drawn: list[int]) -> list[int]:
    """The path from the root."""
    path = [0]
    while True:
        children = [
            node
            for node, parent in enumerate(parents)
            if parent == path[-1] and tokens[node] == drawn[path[-1]]
        ]
        if not children:
            return path
        path.append(children[0])


@pytest.mark.parametrize("vocab", [2, 3, 7])
@pytest.mark.parametrize("seed", range(6))
def test_walks_over_random_trees_equal_a_walk_in_python(
    reference_ops: Ops, vocab: int, seed: int
) -> None:
    rng = random.Random(1000 * vocab + seed)
    rows, draws = [], []
    for _ in range(12):
        parents = random_parents(rng.choice([1, 2, 5, 17, 64]), rng, rng.randint(1, 9))
        rows.append((parents, [rng.randrange(vocab) for _ in parents]))
        draws.append([rng.randrange(vocab) for _ in parents])
    tree = tree_of(rows)
    drawn = torch.tensor([d + [-1] * (tree.tokens.shape[1] - len(d)) for d in draws])
    result = walk(tree, drawn, reference_ops)
    assert result.path.shape == (12, tree.max_depth + 1)
    for row, (parents, tokens) in enumerate(rows):
        path = python_walk(parents, tokens, draws[row])
        behind = [-1] * (tree.max_depth + 1 - len(path))
        assert result.path[row].tolist() == path + behind
        assert result.emitted[row].tolist() == [draws[row][node] for node in path] + behind
        assert result.num_accepted[row] == len(path) - 1


@pytest.mark.parametrize("num_nodes", [4, 26, 64])
def test_masks_of_a_shape_reach_the_tree(num_nodes: int) -> None:
    shape = random_shape(num_nodes)
    tree = DraftTree.of_shape(
        shape, torch.zeros(2, num_nodes, dtype=torch.int64), torch.tensor([num_nodes, num_nodes])
    )
    assert tree.ancestors[1].tolist() == [signed(mask) for mask in ancestors_of(shape.parents)]
