"""Rounding for the inputs of a layer changes its outputs less than rounding to the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quantising.rounding import (
    Float8,
    FourBits,
    Grid,
    Rounded,
    round_for_inputs,
    round_to_nearest,
)
from kernels.linear.scaled import FP8

N, K, T = 40, 192, 600  # more inputs than are rounded together
GRIDS = {"fp8": Float8(torch.float32), "int4": FourBits(32, torch.bfloat16)}


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> Grid:
    return GRIDS[request.param]


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """[T, K] that depend on each other, some large, one always zero."""
    noise = torch.Generator().manual_seed(0)
    mixed = torch.randn(T, K, generator=noise) @ torch.randn(K, K, generator=noise)
    mixed[:, 5] = 0
    mixed[:, 7] *= 20
    return mixed


def weight(seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def error(rounded: Rounded, plain: Tensor, inputs: Tensor) -> float:
    return ((rounded.numbers - plain) @ inputs.T).square().mean().item()


def test_outputs_change_less_than_half_as_much(grid: Grid, inputs: Tensor) -> None:
    nearest = round_to_nearest(weight(), grid)
    fitted = round_for_inputs(weight(), inputs.T @ inputs, grid)
    assert error(fitted, weight(), inputs) < 0.5 * error(nearest, weight(), inputs)


def test_inputs_without_relation_are_rounded_to_the_nearest(grid: Grid) -> None:
    nearest = round_to_nearest(weight(), grid)
    fitted = round_for_inputs(weight(), torch.eye(K), grid)
    assert torch.equal(fitted.codes, nearest.codes)
    assert torch.equal(fitted.scales, nearest.scales)


def test_codes_and_scales_are_what_files_hold(grid: Grid, inputs: Tensor) -> None:
    fitted = round_for_inputs(weight(), inputs.T @ inputs, grid)
    if isinstance(grid, FourBits):
        assert fitted.scales.shape == (N, K // 32)
        assert torch.equal(fitted.scales.bfloat16().float(), fitted.scales)
        assert set(fitted.codes.unique().tolist()) == set(range(-8, 8))
    else:
        assert fitted.scales.shape == (N, 1)
        assert torch.equal(fitted.codes.to(FP8).float(), fitted.codes)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0])
def test_odd_weights_and_texts_give_finite_numbers(grid: Grid, value: float) -> None:
    """No input is ever other than zero; weights are all alike, and too small for any scale."""
    fitted = round_for_inputs(torch.full((N, K), value), torch.zeros(K, K), grid)
    assert bool(fitted.numbers.isfinite().all())
    assert torch.allclose(fitted.numbers, torch.full((N, K), value), rtol=0.01, atol=1e-9)
