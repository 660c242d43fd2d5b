"""Triton's tree operations give the integers of the references."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from kernels.tree import reference
from tests.kernels import triton_env
from tests.kernels.tree.test_tree_ops import random_candidates
from tests.support.drafts.scripted_proposer import random_parents

kernel = triton_env.load("kernels.tree.triton_kernel")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]
DEVICE = triton_env.DEVICE


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize(("C", "num_nodes"), [(1, 2), (7, 4), (40, 41), (300, 64), (5, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_selection(C: int, num_nodes: int, ties: bool) -> None:
    limits = [num_nodes, 0, 1, max(2, num_nodes // 2), num_nodes + 7]
    candidates = random_candidates(len(limits), C, ties)
    args = [part.to(DEVICE) for part in (*candidates, torch.tensor(limits))]
    same(kernel.select(*args, num_nodes), reference.select(*args, num_nodes))


@pytest.mark.parametrize("size", [1, 2, 13, 64])
def test_ancestors(size: int) -> None:
    rng = random.Random(size)
    trees = [random_parents(size, rng), list(range(-1, size - 1)), [-1] * size]
    parents = torch.tensor(trees, device=DEVICE)
    wide = torch.full((3, size + 5), 99, device=DEVICE)
    wide[:, :size] = parents
    same(kernel.ancestors(wide[:, :size]), reference.ancestors(parents))


@pytest.mark.parametrize("size", [1, 2, 13, 64])
def test_walks(size: int) -> None:
    rng = random.Random(size)
    trees = [*(random_parents(size, rng) for _ in range(5)), list(range(-1, size - 1))]
    parents = torch.tensor(trees, device=DEVICE)
    max_depth = int(reference.ancestors(parents)[1].max())
    generator = torch.Generator().manual_seed(size)
    tokens, drawn = torch.randint(0, 2, (2, 6, size), generator=generator).to(DEVICE).unbind()
    drawn[5] = tokens[5].roll(-1)  # down the whole chain
    parents[1, size // 2 :] = -1  # unused nodes
    tokens[1, size // 2 :] = -1
    args = (tokens, parents, drawn, max_depth)
    got = kernel.walk(*args)
    same(got, reference.walk(*args))
    assert got[1][5] == size - 1
