"""Draft trees as tensors: from a shape, cut, mixed; and the walk compared with one in Python."""

from __future__ import annotations

import random

import pytest
import torch

from engine.speculation.verify import walk
from engine.step.shape import StaticShape, ancestors_of, chain, signed
from engine.step.tree import DraftTree
from kernels.ops import Ops
from tests.support.drafts.scripted_proposer import random_parents, random_shape, tree_of
from tests.support.drafts.trees import filled

Row = tuple[list[int], list[int]]  # parents and tokens
HAND = StaticShape("hand", (-1, 0, 0, 1, 3, 2))


def same(tree: DraftTree, other: DraftTree) -> None:
    """Assert that two batches of trees are equal except in unused nodes."""
    assert torch.equal(tree.sizes, other.sizes)
    assert torch.equal(tree.parents, other.parents)
    inside = torch.arange(tree.tokens.shape[1]) < tree.sizes[:, None]
    for part in ("tokens", "depths", "ancestors"):
        assert torch.equal(getattr(tree, part)[inside], getattr(other, part)[inside]), part
    assert tree.max_depth == other.max_depth


def random_rows(rng: random.Random, count: int, most: int = 20) -> list[Row]:
    rows = []
    for _ in range(count):
        parents = random_parents(rng.randint(1, most), rng)
        rows.append((parents, [rng.randrange(9) for _ in parents]))
    return rows


def padded(tree: DraftTree, width: int, depth: int) -> DraftTree:
    """Wider than needed, with arbitrary values in unused nodes and a larger `max_depth`."""
    missing = width - tree.tokens.shape[1]
    inside = torch.arange(width) < tree.sizes[:, None]

    def wide(part: torch.Tensor, unused: int) -> torch.Tensor:
        return torch.nn.functional.pad(part, (0, missing)).masked_fill(~inside, unused)

    return DraftTree(
        wide(tree.tokens, 77),
        wide(tree.parents, -1),
        wide(tree.depths, 55),
        wide(tree.ancestors, -1),
        tree.sizes,
        depth,
    )


@pytest.mark.parametrize("sizes", [[6, 6], [4, 2], [1, 5], [1, 1]])
def test_a_shape_is_filled_and_cut_row_by_row(sizes: list[int]) -> None:
    tokens = torch.arange(12).view(2, 6) + 50
    tree = filled(HAND, tokens, torch.tensor(sizes))
    rows = [(HAND.parents[:size], tokens[row, :size].tolist()) for row, size in enumerate(sizes)]
    same(tree, padded(tree_of(rows), HAND.num_nodes, HAND.max_depth))


def test_the_last_of_64_nodes_has_the_sign_bit() -> None:
    shape = chain(63)
    tree = filled(shape, torch.zeros(1, 64, dtype=torch.int64), torch.tensor([64]))
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
    tree = tree_of(rows)
    cut = tree.cut(torch.tensor(sizes))
    same(cut, padded(tree_of(kept), tree.tokens.shape[1], tree.max_depth))


def test_roots_are_trees_of_one_node() -> None:
    same(DraftTree.roots(torch.tensor([4, 9])), tree_of([([-1], [4]), ([-1], [9])]))


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_picked_from_either_of_two_batches(seed: int) -> None:
    rng = random.Random(seed)
    ours, theirs = random_rows(rng, 6), random_rows(rng, 6, most=rng.choice([1, 9, 40]))
    taken = [rng.random() < 0.5 for _ in ours]
    mixed = tree_of(ours).where(torch.tensor(taken), tree_of(theirs))
    wanted = tree_of([a if own else b for own, a, b in zip(taken, ours, theirs, strict=True)])
    width = mixed.tokens.shape[1]
    assert width == max(len(parents) for parents, _ in (*ours, *theirs))
    assert mixed.max_depth == max(tree_of(ours).max_depth, tree_of(theirs).max_depth)
    same(mixed, padded(wanted, width, mixed.max_depth))


@pytest.mark.parametrize("seed", range(8))
def test_a_known_draft_is_a_chain_in_place_of_the_tree(seed: int) -> None:
    rng = random.Random(seed)
    grown = random_rows(rng, 6)
    width = rng.choice([1, 5, 30])
    lengths = [rng.choice([0, rng.randint(1, width)]) for _ in grown]
    drafts = [[100 + rng.randrange(9) for _ in range(width)] for _ in grown]
    tree = tree_of(grown).with_chains(torch.tensor(drafts), torch.tensor(lengths))
    wanted = [
        (list(range(-1, length)), [tokens[0], *draft[:length]]) if length else (parents, tokens)
        for (parents, tokens), draft, length in zip(grown, drafts, lengths, strict=True)
    ]
    depth = max(width, tree_of(grown).max_depth)
    assert tree.max_depth == depth
    same(tree, padded(tree_of(wanted), tree.tokens.shape[1], depth))


@pytest.mark.parametrize("seed", range(8))
def test_a_narrowed_tree_has_the_width_and_depth_of_its_nodes(seed: int) -> None:
    rows = random_rows(random.Random(seed), 5)
    same(padded(tree_of(rows), 64, 63).narrowed(), tree_of(rows))
    narrowed = padded(tree_of(rows), 64, 63).narrowed()
    assert narrowed.tokens.shape == tree_of(rows).tokens.shape


def test_unused_nodes_have_no_depth() -> None:
    tree = filled(chain(5), torch.zeros(2, 6, dtype=torch.int64), torch.tensor([3, 1]))
    assert tree.narrowed().max_depth == 2
    assert tree.cut(torch.tensor([1, 1])).narrowed().max_depth == 0


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
        after = [-1] * (tree.max_depth + 1 - len(path))
        assert result.path[row].tolist() == path + after
        assert result.emitted[row].tolist() == [draws[row][node] for node in path] + after
        assert result.num_accepted[row] == len(path) - 1


@pytest.mark.parametrize("num_nodes", [4, 26, 64])
def test_masks_of_a_shape_reach_the_tree(num_nodes: int) -> None:
    shape = random_shape(num_nodes)
    tree = filled(
        shape, torch.zeros(2, num_nodes, dtype=torch.int64), torch.tensor([num_nodes, num_nodes])
    )
    assert tree.ancestors[1].tolist() == [signed(mask) for mask in ancestors_of(shape.parents)]


def test_a_tree_ends_at_the_given_depth(reference_ops: Ops) -> None:
    """The walk stops there, and the token drawn at its last node is the bonus."""
    roots = DraftTree.roots(torch.tensor([5, 5]))
    chains = roots.with_chains(torch.tensor([[6, 7, 8]] * 2), torch.tensor([3, 3]))
    drawn = torch.tensor([[6, 7, 8, 9]] * 2)
    result = walk(chains.ending_at(torch.tensor([1, 9])), drawn, reference_ops)
    assert result.num_accepted.tolist() == [1, 3]
    assert result.emitted.tolist() == [[6, 7, -1, -1], [6, 7, 8, 9]]
