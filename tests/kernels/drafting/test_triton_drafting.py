"""The steps between the forwards of a draft head: one launch each gives what torch gives."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter.static_levels import StaticLevels
from engine.step.shape import DynamicShape, StaticShape, chain
from kernels.drafting import reference
from kernels.drafting.nodes import (
    Candidates,
    Frontier,
    HeadInput,
    LevelNodes,
    RootStates,
    RowPlaces,
)
from kernels.norm import reference as norm
from kernels.ops import LinearWeight
from tests.kernels import triton_env

kernel = triton_env.load("kernels.drafting.triton_kernel")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]
DEVICE = triton_env.DEVICE
BUSHY = StaticShape("bushy", (-1, 0, 0, 1, 1, 2, 3, 4, 6, 6))
LEVELS = StaticLevels(DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def same(got: Any, expected: Any) -> None:
    """All tensors of two dataclasses are equal, NaN included."""
    for part in fields(expected):
        one, other = getattr(got, part.name), getattr(expected, part.name)
        assert one.dtype == other.dtype, part.name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=part.name)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_roots_are_ready(window: int | None, dtype: torch.dtype) -> None:
    """A row that drafts, one without a state, one whose state is NaN or infinite, one without a
    draft, and padding; the window may begin before the first entry, or after it."""
    states = triton_env.numbers(8, 40, dtype=dtype)
    states[2, 39], states[3, 0] = torch.nan, -torch.inf
    roots = RootStates(
        lines=integers(1, 0, 2, 3, 4, 5, 7, 7),
        positions=integers(9, 9, 30, 3, 12, 9, 0, 0),
        max_nodes=integers(4, 4, 4, 9, 1, 2, 0, 0),
        states=states,
        state_positions=integers(8, 9, 30, 3, 12, 9, -1, -1),
        firsts=integers(1, 1, 2, 3, 11, 9, 1, 1).int(),
        num_drafted=6,
        window=window,
    )
    got = kernel.ready_roots(roots)
    same(got, reference.ready_roots(roots))
    assert got.ready.tolist() == [True, False, False, False, False, True, False, False]
    assert got.faults.tolist() == [False, False, True, True, False, False, False, False]
    assert got.sizes.tolist() == [4, 1, 1, 1, 1, 2, 0, 0]
    assert got.num_slots.tolist() == [6, 6, 6, 9, 1, 6, 0, 0]


@pytest.mark.parametrize(
    "nodes",
    [
        LEVELS.of(chain(2)).inner,
        LEVELS.of(BUSHY).inner,
        LEVELS.frontiers(DynamicShape("dynamic", 16, 4, 6)),
        LEVELS.frontiers(DynamicShape("all", 64, 8, 9)),
    ],
    ids=["chain", "tree", "dynamic", "largest"],
)
@pytest.mark.parametrize("num_rows", [1, 5])
def test_where_the_nodes_of_all_levels_lie(nodes: LevelNodes, num_rows: int) -> None:
    """With few slots, at the end of a table, and at the last position of a sequence."""
    wide = torch.arange(5 * 9, dtype=torch.int32, device=DEVICE).view(5, 9) * 3
    rows = RowPlaces(
        positions=integers(3, 0, 26, 23, 7)[:num_rows],
        num_slots=integers(64, 0, 64, 3, 1)[:num_rows],
        tables=wide[:num_rows, :7],
        block_size=4,
        first_scratch=400,
        max_len=28,
    )
    got, expected = kernel.lay_levels(nodes, rows), reference.lay_levels(nodes, rows)
    firsts = sorted(set(zip(nodes.firsts.tolist(), nodes.widths.tolist(), strict=True)))
    for first, width in firsts:
        level = got.level(first, width)
        same(level, expected.level(first, width))
        assert len(level.slots) == num_rows * width
        here = nodes.nodes[first : first + width].tolist()
        assert level.masks.view(num_rows, width)[0].tolist() == [
            int(nodes.masks[first + place]) if node < 64 else 1 for place, node in enumerate(here)
        ]


def test_a_row_lies_alike_alone_and_among_others() -> None:
    nodes = LEVELS.of(BUSHY).inner
    tables = torch.arange(30, dtype=torch.int32, device=DEVICE).view(3, 10)
    rows = RowPlaces(integers(5, 6, 7), integers(10, 4, 1), tables, 4, 400, 99)
    together = kernel.lay_levels(nodes, rows).level(0, 2)
    alone = replace(rows, positions=integers(6), num_slots=integers(4), tables=tables[1:2])
    assert (
        kernel.lay_levels(nodes, alone).level(0, 2).slots.tolist() == together.slots[2:4].tolist()
    )


@pytest.mark.parametrize(("K", "k"), [(1, 4), (4, 4), (3, 1), (30, 30)])
@pytest.mark.parametrize("ties", [False, True])
def test_a_level_of_a_dynamic_tree(K: int, k: int, ties: bool) -> None:
    """After the root, in the middle, and at the end; with scores that are no log-probabilities."""
    B, first = 3, 2
    local = triton_env.numbers(B, K, k, seed=K) - 1  # some above 0
    above = -triton_env.numbers(B, K, seed=1).abs()
    if ties:
        local, above = local.round(), above.round()
        local[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)[:k]
    order = torch.arange(B * K * k, device=DEVICE)
    tokens, bits = order.view(B, K, k) * 7 + 1, (1 << (order[: B * k] % 60))
    masks, places = order[: B * K].view(B, K) * 8 + 3, order[: B * K].view(B, K) + 1
    middle = Frontier(masks, above, masks, places, order[: B * K])
    for frontier, own in ((None, bits), (middle, bits), (middle, None))[K > 1 :]:
        rooms = [
            Candidates(*(torch.full((B, K * k + 5), -9, device=DEVICE) for _ in range(2)), scores)
            for scores in torch.zeros(2, B, K * k + 5, device=DEVICE)
        ]
        got = kernel.triton_growth.grow_level(tokens, local, frontier, own, rooms[0], first)
        expected = reference.grow_level(tokens, local, frontier, own, rooms[1], first)
        same(rooms[0], rooms[1])
        assert (got is None) == (expected is None) == (own is None)
        if expected is not None:
            same(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed_residual", [False, True])
def test_what_a_head_reads_is_what_its_parts_give(
    dtype: torch.dtype, normed_residual: bool
) -> None:
    """Of features in order, and of those of parents."""
    H, eps = 48, 1e-5
    table = triton_env.numbers(20, H, dtype=dtype)
    weights = 1 + triton_env.numbers(2, H, seed=2) / 9
    ids, parents = integers(3, 19, 0, 7, 7), integers(2, 2, 0, 1, 2)
    features = triton_env.spaced(triton_env.numbers(5, H, seed=3, dtype=dtype))
    for feature_of in (None, parents):
        given = HeadInput(
            ids, features, feature_of, weights[0], eps, weights[1], 1e-6, normed_residual
        )
        own = features if feature_of is None else features[feature_of]
        embedded = norm.rms_norm(table[ids], weights[0], eps)
        normed = norm.rms_norm(own.contiguous(), weights[1], 1e-6)
        x, residual = kernel.triton_entry.enter_head(given, LinearWeight(table, None, 20, H))
        triton_env.close(x, torch.cat((embedded, normed), dim=1))
        triton_env.close(residual, normed if normed_residual else own)


@pytest.mark.parametrize("window", [None, 4])
def test_the_first_entry_that_a_row_attends_to(window: int | None) -> None:
    firsts, lines = integers(1, 1, 7, 20).int(), integers(3, 0, 2, 1, 1)
    prefix_lens = integers(9, 0, 30, 5, 3).int()
    got = kernel.first_keys(firsts, lines, prefix_lens, window)
    expected = reference.first_keys(firsts, lines, prefix_lens, window)
    assert got.dtype == expected.dtype
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_of_the_last_entries_are_kept_by_line(dtype: torch.dtype) -> None:
    lines, last, newest = integers(2, 0, 4), integers(5, 1, 0), integers(9, -1, 30)
    states = triton_env.numbers(6, 40, seed=4, dtype=dtype)
    kept = [(triton_env.numbers(5, 40, dtype=dtype), integers(3, 4, 5, 6, 7)) for _ in range(2)]
    kernel.keep_states(*kept[0], lines, states, last, newest)
    reference.keep_states(*kept[1], lines, states, last, newest)
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)
