"""The experts in Triton against the reference in float32, with experts that get no token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.moe import reference
from kernels.ops import ExpertWeights, LinearWeight
from tests.kernels import triton_env
from tests.kernels.triton_env import close, numbers, spaced

kernel = triton_env.load("kernels.moe.triton_kernel")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]


def experts(E: int, H: int, F: int, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    gate_up = numbers(E, H, 2 * F, seed=1, dtype=dtype) / H**0.5
    down = numbers(E, F, H, seed=2, dtype=dtype) / F**0.5
    return ExpertWeights(
        (LinearWeight(gate_up, None, 2 * F, H),), (LinearWeight(down, None, H, F),)
    )


def in_float32(weights: ExpertWeights) -> ExpertWeights:
    (gate_up,), (down,) = weights.gate_up, weights.down
    wide = [
        LinearWeight(one.data.float(), None, one.out_features, one.in_features)
        for one in (gate_up, down)
    ]
    return ExpertWeights((wide[0],), (wide[1],))


def some_of(weights: ExpertWeights, held: range) -> ExpertWeights:
    """Only the experts `held`."""
    own = slice(held.start, held.stop)
    parts = [
        replace(part, data=part.data[own], scales=None if part.scales is None else part.scales[own])
        for part in (*weights.gate_up, *weights.down)
    ]
    return ExpertWeights((parts[0],), (parts[1],), held)


@pytest.mark.parametrize(
    ("T", "E", "H", "F", "dtype"),
    [
        (1, 4, 96, 80, torch.float32),
        (7, 16, 32, 40, torch.bfloat16),
        (37, 3, 72, 24, torch.float32),  # some tiles are full
        (101, 3, 40, 32, torch.bfloat16),  # tiles of many rows
    ],
)
def test_experts_equal_the_reference(T: int, E: int, H: int, F: int, dtype: torch.dtype) -> None:
    x, logits, weights = numbers(T, H, dtype=dtype), numbers(T, E, seed=3), experts(E, H, F, dtype)
    got = kernel.moe(x, logits, weights)
    assert (got.shape, got.dtype) == ((T, H), dtype)
    # Triton's interpreter cuts bits off where a GPU rounds, here three times in turn.
    looser = {"atol": 2e-2, "rtol": 3e-2} if dtype == torch.bfloat16 else {}
    close(got, reference.moe(x.float(), logits, in_float32(weights)), **looser)


def test_rows_may_lie_apart_and_all_tokens_may_have_one_expert() -> None:
    x, weights = spaced(numbers(33, 48)), experts(5, 48, 16)
    logits = numbers(33, 5, seed=3)
    logits[:, 3] = 9.0
    close(kernel.moe(x, logits, weights), reference.moe(x, logits, weights))


@pytest.mark.parametrize("held", [range(2), range(2, 5)])
def test_tokens_of_experts_that_are_not_held_get_zeros(held: range) -> None:
    x, logits, weights = numbers(37, 48), numbers(37, 5, seed=3), experts(5, 48, 16)
    part = some_of(weights, held)
    close(kernel.moe(x, logits, part), reference.moe(x, logits, part))
    mine = torch.isin(logits.argmax(dim=1), torch.tensor(held, device=x.device))
    whole = reference.moe(x, logits, weights) * mine[:, None]
    close(reference.moe(x, logits, part), whole)
