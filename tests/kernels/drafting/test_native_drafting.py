"""The steps between the forwards of a draft head in C++ give what torch gives."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter.static_levels import StaticLevels
from engine.step.shape import StaticShape, chain
from kernels.drafting import reference
from kernels.drafting.nodes import RootStates, RowPlaces
from kernels.ops import Ops

LINES, H = 9, 40
LEVELS = StaticLevels(torch.device("cpu"))
BUSHY = StaticShape("bushy", (-1, 0, 0, 1, 1, 2, 3, 4, 6, 6))


def same(got: Any, expected: Any) -> None:
    """All tensors of two dataclasses are equal, NaN included."""
    for part in fields(expected):
        one, other = getattr(got, part.name), getattr(expected, part.name)
        assert one.dtype == other.dtype, part.name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=part.name)


def some(made: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=made)


@pytest.mark.parametrize("window", [None, 0, 4])
@pytest.mark.parametrize("seed", range(6))
def test_which_roots_are_ready(native: Ops, seed: int, window: int | None) -> None:
    """Random rows, with states that are NaN, infinite or of another position, and padding."""
    made = torch.Generator().manual_seed(seed)
    states = torch.randn(LINES, H, generator=made)
    states[2, H - 1], states[5, 0] = torch.nan, -torch.inf
    lines = torch.cat((torch.randperm(LINES - 1, generator=made), torch.full((2,), LINES - 1)))
    positions = some(made, 0, 30, LINES + 1)
    state_positions = some(made, -1, 30, LINES)
    state_positions[lines[:5]] = positions[:5]
    roots = RootStates(
        lines=lines,
        positions=positions,
        max_nodes=some(made, 0, 7, LINES + 1),
        states=states,
        state_positions=state_positions,
        firsts=some(made, 1, 30, LINES).int(),
        num_drafted=4,
        window=window,
    )
    same(native.ready_roots(roots), reference.ready_roots(roots))
    for lens in (positions, positions.int(), positions.repeat_interleave(2)[::2]):
        got = native.first_keys(roots.firsts, lines, lens, window)
        assert torch.equal(got, reference.first_keys(roots.firsts, lines, lens, window))


@pytest.mark.parametrize("nodes", [LEVELS.of(chain(3)).inner, LEVELS.of(BUSHY).inner])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_where_the_nodes_of_all_levels_lie(native: Ops, nodes: Any, num_rows: int) -> None:
    """With few slots, at the end of a table that is part of another, and at the last position."""
    wide = torch.arange(5 * 9, dtype=torch.int32).view(5, 9) * 3
    rows = RowPlaces(
        positions=torch.tensor([3, 0, 26, 23, 7])[:num_rows],
        num_slots=torch.tensor([64, 0, 64, 3, 1])[:num_rows],
        tables=wide[:num_rows, :7],
        block_size=4,
        first_scratch=400,
        max_len=28,
    )
    same(native.lay_levels(nodes, rows), reference.lay_levels(nodes, rows))


def test_states_are_kept_by_line(native: Ops) -> None:
    lines, last = torch.tensor([4, 0, 8]), torch.tensor([2, 0, 5])
    states, newest = torch.randn(6, 2 * H)[:, :H], torch.tensor([7, -1, 3])
    kept = [(torch.zeros(LINES, H), torch.full((LINES,), -9)) for _ in range(2)]
    native.keep_states(*kept[0], lines, states, last, newest)
    reference.keep_states(*kept[1], lines, states, last, newest)
    assert torch.equal(kept[0][0], kept[1][0])
    assert torch.equal(kept[0][1], kept[1][1])
