"""Products of few rows of the Triton backend against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import LinearWeight
from tests.kernels import triton_env
from tests.kernels.triton_env import close, numbers, spaced

kernel = triton_env.load("kernels.linear.triton_skinny")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough that tiles are split in all ways below."""
    monkeypatch.setattr(kernel, "_processors", lambda _device: 3)


def weight_of(N: int, K: int, *, bias: bool, dtype: torch.dtype) -> LinearWeight:
    offset = numbers(N, seed=2) if bias else None
    return LinearWeight(numbers(N, K, seed=1, dtype=dtype), offset, N, K)


def in_float64(x: Tensor, weight: LinearWeight) -> Tensor:
    bias = None if weight.bias is None else weight.bias.double()
    return F.linear(x.double(), weight.data.double(), bias)


# Pieces of 64 outputs and 32 inputs; programs in all, and the tiles that they split
SHAPES = {
    "one program": (5, 64, 64, 1),
    "whole tiles": (1, 192, 96, 1),  # a program each
    "a tile for all": (16, 40, 200, 2),
    "runs that end within tiles": (3, 130, 160, 2),
    "more programs than pieces": (2, 64, 40, 9),
}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_product_equals_float64(name: str, dtype: torch.dtype) -> None:
    T, N, K, programs = SHAPES[name]
    x, plan = numbers(T, K, dtype=dtype), kernel.Plan(64, 32, 2, programs)
    weight = weight_of(N, K, bias=T % 2 == 1, dtype=dtype)
    got = kernel.linear_few(spaced(x), weight, plan)
    assert (got.shape, got.dtype) == ((T, N), dtype)
    close(got, in_float64(x, weight), atol=1e-4)


@pytest.mark.parametrize("name", ["whole tiles", "runs that end within tiles"])
def test_gate_times_up_equals_float64(name: str) -> None:
    T, N, K, programs = SHAPES[name]
    x, weight = numbers(T, K, dtype=BF16), weight_of(2 * N, K, bias=T == 3, dtype=BF16)
    gate, up = in_float64(x, weight).chunk(2, dim=-1)
    got = kernel.gated_linear_few(x, weight, kernel.Plan(64, 32, 2, programs))
    assert got.shape == (T, N)
    close(got, F.silu(gate) * up, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
def test_a_row_is_the_same_alone_and_among_others(gated: bool) -> None:
    x, weight = numbers(16, 96, dtype=BF16), weight_of(120, 96, bias=True, dtype=BF16)
    run = kernel.gated_linear_few if gated else kernel.linear_few
    together = run(x, weight, kernel.Plan(64, 32, 2, 1))
    for first, last in ((0, 1), (4, 9)):
        alone = run(x[first:last], weight, kernel.Plan(64, 32, 2, 1))
        assert torch.equal(alone, together[first:last])


def test_launches_leave_the_counters_at_zero() -> None:
    x, weight = numbers(2, 160, dtype=BF16), weight_of(130, 160, bias=False, dtype=BF16)
    first, second = (kernel.linear_few(x, weight, kernel.Plan(64, 32, 2, 2)) for _ in range(2))
    assert torch.equal(first, second)
    assert not kernel._counters(x.device).any()


def test_no_rows_give_no_results() -> None:
    weight = weight_of(64, 32, bias=False, dtype=BF16)
    got = kernel.linear_few(numbers(0, 32, dtype=BF16), weight, kernel.Plan(64, 32, 2, 1))
    assert got.shape == (0, 64)
