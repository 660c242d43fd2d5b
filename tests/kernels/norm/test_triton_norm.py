"""RMS normalisation in Triton against the reference in float32."""

from __future__ import annotations

import pytest
import torch

from kernels.norm import reference
from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE, close, numbers, poison, spaced

kernel = triton_env.load("kernels.norm.triton_kernel")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(1, 1), (3, 17), (5, 576), (2, 4096), (1, 16384)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_rms_norm_equals_the_reference(T: int, H: int, dtype: torch.dtype) -> None:
    x, weight = numbers(T, H, dtype=dtype) * 3, numbers(H, seed=1)
    got = kernel.rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    close(got, reference.rms_norm(x.float(), weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_add_rms_norm_equals_the_reference(T: int, H: int, dtype: torch.dtype) -> None:
    x, residual = numbers(T, H, dtype=dtype), numbers(T, H, seed=1, dtype=dtype) * 5
    weight, sum_of_both = numbers(H, seed=2), x.float() + residual.float()
    got = kernel.add_rms_norm(x, residual, weight, 1e-5)
    close(residual, sum_of_both)
    close(got, reference.rms_norm(residual.float(), weight, 1e-5))  # of the stored sum


def test_rows_may_lie_apart_and_what_is_between_stays() -> None:
    x, memory = spaced(numbers(3, 40)), poison(3, 64)
    residual, weight = memory[:, :40], numbers(40, seed=2)
    residual.copy_(numbers(3, 40, seed=1))
    expected_residual = residual + x
    got = kernel.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    assert memory[:, 40:].isnan().all()
    close(got, reference.rms_norm(expected_residual, weight, 1e-5))
    close(kernel.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_eps_decides_for_rows_of_zeros_and_tiny_numbers() -> None:
    x = torch.zeros(2, 24, device=DEVICE)
    x[1] = 1e-4
    weight = torch.ones(24, device=DEVICE)
    close(kernel.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_no_rows_give_no_rows() -> None:
    got = kernel.rms_norm(numbers(0, 64), numbers(64), 1e-5)
    assert got.shape == (0, 64)
