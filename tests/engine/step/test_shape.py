"""Tree shapes: what is refused, and depths and ancestors by hand."""

from __future__ import annotations

import random

import pytest

from engine.step.shape import (
    MAX_NODES,
    ROOT,
    DynamicShape,
    StaticShape,
    ancestors_of,
    chain,
    depths_of,
    signed,
)
from tests.support.drafts.scripted_proposer import random_parents


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((), "has 0 nodes; 1 to 64 are possible"),
        (tuple(range(-1, MAX_NODES)), "has 65 nodes"),
        ((0,), "node 0 is the root, its parent is -1"),
        ((-1, 1), "node 1 has parent 1; a parent comes before"),
        ((-1, 2, 0), "node 1 has parent 2"),
        ((-1, -1), "node 1 has parent -1"),
        ((-1, 0, -2), "node 2 has parent -2"),
    ],
    ids=["empty", "too-many", "root", "itself", "later", "two-roots", "negative"],
)
def test_parents_that_are_no_tree_are_refused(parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        StaticShape("odd", parents)
    assert "'odd'" in str(error.value)


@pytest.mark.parametrize(
    ("num_nodes", "max_depth", "top_k", "message"),
    [
        (1, 3, 3, "num_nodes is 1, not in 2 .. 64"),
        (65, 3, 3, "num_nodes is 65"),
        (8, 0, 3, "max_depth 0"),
        (8, 64, 1, "max_depth 64"),
        (8, 3, 0, "top_k 0"),
    ],
)
def test_dynamic_limits_are_checked(
    num_nodes: int, max_depth: int, top_k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicShape("odd", num_nodes, max_depth, top_k)


def test_a_small_tree_by_hand() -> None:
    shape = StaticShape("hand", (-1, 0, 0, 1, 3, 2))
    assert shape.num_nodes == 6
    assert shape.depths == (0, 1, 1, 2, 3, 2)
    assert shape.max_depth == 3
    assert shape.ancestors == (0b1, 0b11, 0b101, 0b1011, 0b11011, 0b100101)


def test_a_chain_and_the_root() -> None:
    assert chain(3) == StaticShape("chain3", (-1, 0, 1, 2))
    assert chain(0).parents == ROOT.parents
    assert chain(63).depths == tuple(range(64))


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 33, 64])
def test_depths_and_ancestors_follow_the_parents(num_nodes: int) -> None:
    parents = random_parents(num_nodes, random.Random(num_nodes))
    depths, masks = depths_of(parents), ancestors_of(parents)
    for node in range(num_nodes):
        line, at = {node}, node
        while at > 0:
            at = parents[at]
            line.add(at)
        assert {bit for bit in range(64) if masks[node] >> bit & 1} == line
        assert depths[node] == len(line) - 1


@pytest.mark.parametrize(
    ("mask", "expected"), [(1, 1), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)]
)
def test_masks_fit_signed_integers(mask: int, expected: int) -> None:
    assert signed(mask) == expected


def test_a_chain_is_a_tree_in_which_each_node_follows_the_one_before() -> None:
    others = (StaticShape("tree", (-1, 0, 0)), StaticShape("fork", (-1, 0, 1, 1)))
    assert all(shape.is_chain for shape in (ROOT, chain(1), chain(3), DynamicShape("d", 4, 3, 1)))
    assert not any(shape.is_chain for shape in (*others, DynamicShape("d", 4, 3, 2)))
