"""Gated activations in Triton against the reference in float32."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import reference
from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE, close, numbers, spaced

kernel = triton_env.load("kernels.activation.triton_kernel")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "F"), [(1, 1), (7, 35), (3, 1536), (1, 2049)])
def test_silu_and_mul_equals_the_reference(T: int, F: int, dtype: torch.dtype) -> None:
    gate_up = numbers(T, 2 * F, dtype=dtype) * 4
    got = kernel.silu_and_mul(gate_up)
    assert (got.shape, got.dtype) == ((T, F), dtype)
    close(got, reference.silu_and_mul(gate_up.float()))


def test_rows_may_lie_apart() -> None:
    gate_up = spaced(numbers(3, 2 * 40))
    close(kernel.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


def test_silu_survives_extreme_values() -> None:
    gate = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4, -0.0]], device=DEVICE)
    got = kernel.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 88.0, 200.0, 1e4, 0.0]], device=DEVICE)
    torch.testing.assert_close(got, expected, atol=1e-30, rtol=1e-6)
