"""Linear layers and embedding of the Triton backend against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE, close, numbers

kernel = triton_env.load("kernels.linear.triton_kernel")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear_equals_float32(with_bias: bool, dtype: torch.dtype) -> None:
    x, weight = numbers(5, 64, dtype=dtype), numbers(33, 64, seed=1, dtype=dtype)
    bias = numbers(33, seed=2).to(torch.bfloat16).float() if with_bias else None
    packed = kernel.pack_linear(weight, bias)
    got = kernel.linear(x, packed)
    assert (got.dtype, packed.out_features, packed.in_features) == (dtype, 33, 64)
    # torch rounds a bfloat16 product before it adds the bias on a CPU, unlike on a GPU.
    atol = 5e-2 if dtype is torch.bfloat16 else 1e-4
    close(got, F.linear(x.float(), weight.float(), bias), atol=atol)


def test_weight_and_activations_of_different_dtypes_are_refused() -> None:
    weight = kernel.pack_linear(numbers(8, 16, dtype=torch.bfloat16), None)
    with pytest.raises(AssertionError, match="float32 activations"):
        kernel.linear(numbers(2, 16), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 35, 576, 2049])
def test_embedding_gives_rows_of_the_packed_weight(K: int, dtype: torch.dtype) -> None:
    table = numbers(50, K, dtype=dtype)
    ids = torch.tensor([49, 0, 7, 7, 12], device=DEVICE)
    got = kernel.embedding(ids, kernel.pack_linear(table, None))
    assert torch.equal(got, table[ids])


def test_embedding_of_nothing_is_empty() -> None:
    ids = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert kernel.embedding(ids, kernel.pack_linear(numbers(5, 8), None)).shape == (0, 8)
