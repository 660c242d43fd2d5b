"""Committing moves exactly the accepted nodes, as a copy in Python does."""

from __future__ import annotations

import random

import pytest
import torch

from engine.kv.storage import KVStorage
from engine.speculation.verify import commit
from engine.step.tree import VerifyResult
from kernels.ops import Ops
from tests.support.drafts.scripted_proposer import random_parents

BLOCK, BLOCKS, LAYERS = 4, 80, 2


def storage() -> KVStorage:
    """Every slot holds different numbers."""
    kv = KVStorage.allocate(LAYERS, BLOCKS, BLOCK, 2, 64, torch.float32, torch.device("cpu"))
    for at, page in enumerate((*kv.keys, *kv.values)):
        page.copy_(torch.arange(page.numel()).view(page.shape) + at * 2**17)
    return kv


def result_of(paths: list[list[int]]) -> VerifyResult:
    width = max(map(len, paths))
    path = torch.tensor([p + [-1] * (width - len(p)) for p in paths])
    return VerifyResult(path, (path >= 0).sum(dim=1) - 1, torch.zeros_like(path))


def random_path(num_nodes: int, rng: random.Random) -> list[int]:
    parents = random_parents(num_nodes, rng)
    path, node = [], rng.randrange(num_nodes)
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def expected(pages: torch.Tensor, slots: list[list[int]], paths: list[list[int]]) -> torch.Tensor:
    before, after = pages.flatten(0, 1), pages.flatten(0, 1).clone()
    for row, path in enumerate(paths):
        for depth, node in enumerate(path):
            after[slots[row][depth]] = before[slots[row][node]]
    return after.view(pages.shape)


@pytest.fixture(params=["reference", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    found: Ops = request.getfixturevalue(f"{request.param}_ops")
    return found


@pytest.mark.parametrize("seed", range(6))
def test_accepted_nodes_lie_where_plain_decoding_puts_them(ops: Ops, seed: int) -> None:
    rng = random.Random(seed)
    kv = storage()
    free = list(range(BLOCKS))
    rng.shuffle(free)
    sizes = [rng.choice([1, 2, 9, 33, 64]) for _ in range(4)]
    slots, paths = [], []
    for size in sizes:
        blocks = [free.pop() for _ in range(18)]
        start = rng.randrange(BLOCK)
        at = range(start, start + size)
        slots.append([blocks[p // BLOCK] * BLOCK + p % BLOCK for p in at])
        paths.append(random_path(size, rng))
    width = max(sizes)
    node_slots = torch.tensor([row + [-1] * (width - len(row)) for row in slots])
    wanted = [expected(page.clone(), slots, paths) for page in (*kv.keys, *kv.values)]
    commit(result_of(paths), node_slots, kv, ops)
    for page, other in zip((*kv.keys, *kv.values), wanted, strict=True):
        assert torch.equal(page, other)


def test_a_chain_moves_nothing(ops: Ops) -> None:
    kv = storage()
    before = [page.clone() for page in kv.keys]
    commit(result_of([[0, 1, 2, 3], [0]]), torch.arange(8).view(2, 4), kv, ops)
    assert all(map(torch.equal, kv.keys, before))
