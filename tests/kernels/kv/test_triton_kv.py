"""Moves inside the paged cache in Triton equal moves in order, even if they overlap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE, numbers

kernel = triton_env.load("kernels.kv.triton_kernel")
pytestmark = triton_env.MARKS

BLOCKS, S = 24, 16


def pages(count: int, Hkv: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    return [numbers(BLOCKS, S, Hkv, D, seed=seed, dtype=dtype) for seed in range(count)]


def moved_one_by_one(page: Tensor, sources: list[int], targets: list[int]) -> Tensor:
    """The result by the operation's definition."""
    slots = page.clone().flatten(0, 1)
    for source, target in zip(sources, targets, strict=True):
        slots[target] = slots[source]
    return slots.view_as(page)


def check(before: list[Tensor], sources: list[int], targets: list[int]) -> None:
    after = [page.clone() for page in before]
    index = [torch.tensor(slots, dtype=torch.int64, device=DEVICE) for slots in (sources, targets)]
    kernel.KVMove()(after, *index)
    for page, moved in zip(before, after, strict=True):
        assert torch.equal(moved, moved_one_by_one(page, sources, targets))


def accepted_paths(rows: int, nodes: int, seed: int) -> tuple[list[int], list[int]]:
    """Sources and targets as `engine/speculation/verify.py` makes them: rows own a shuffled block
    each, a random path through a tree of `nodes` nodes."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(BLOCKS, generator=generator).tolist()
    sources, targets = [], []
    for row in range(rows):
        path = torch.randperm(nodes, generator=generator)[: nodes // 2].sort().values.tolist()
        slots = [S * blocks[(4 * row + i // S) % BLOCKS] + i % S for i in range(nodes + 1)]
        for depth, node in enumerate(path, start=1):
            if node + 1 != depth:
                sources.append(slots[node + 1])
                targets.append(slots[depth])
    return sources, targets


@pytest.mark.parametrize(
    ("dtype", "Hkv", "D"),
    [(torch.bfloat16, 3, 64), (torch.bfloat16, 8, 64), (torch.float32, 1, 10), (torch.int8, 1, 9)],
    ids=str,
)
def test_accepted_paths_move_in_all_pages(dtype: torch.dtype, Hkv: int, D: int) -> None:
    sources, targets = accepted_paths(rows=3, nodes=16, seed=1)
    assert set(sources) & set(targets)
    check(pages(4, Hkv, D, dtype), sources, targets)


def test_a_chain_longer_than_a_tile_moves_in_order() -> None:
    """Every slot takes its neighbour's content: each target is the source of the move before."""
    slots = list(range(200))
    check(pages(2, 4, 64, torch.bfloat16), slots[1:], slots[:-1])


def test_a_long_path_that_overlaps_itself_moves_in_order() -> None:
    sources, targets = accepted_paths(rows=6, nodes=63, seed=2)
    check(pages(1, 2, 64, torch.float32), sources, targets)


def test_a_move_of_a_slot_onto_itself_is_skipped() -> None:
    check(pages(2, 1, 64, torch.bfloat16), [5, 5, 9, 5, 9], [5, 3, 5, 5, 9])
    check(pages(2, 1, 64, torch.bfloat16), [3, 3, 3], [3, 3, 3])


def test_nothing_to_move_is_fine() -> None:
    check(pages(2, 1, 64, torch.bfloat16), [], [])


def test_pages_are_looked_up_by_their_addresses() -> None:
    """Stored addresses of one cache are not used for another, but again for the same one."""
    move, slots = kernel.KVMove(), torch.tensor([1, 0], device=DEVICE)
    first, second = (pages(2, 1, 64, torch.float32) for _ in range(2))
    for target, page_set in enumerate((first, second, first), start=2):
        move(page_set, slots[:1], torch.tensor([target], device=DEVICE))
        for page in page_set:
            assert torch.equal(page[0, target], page[0, 1])
    assert len(move._addresses) == 2
