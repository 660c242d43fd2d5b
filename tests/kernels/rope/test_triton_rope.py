"""Rotation and cache write in Triton against the reference in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.linear.scaled import FP8
from kernels.ops import CacheScales
from kernels.rope import reference
from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE, close, numbers, poison, spaced

kernel = triton_env.load("kernels.rope.triton_kernel")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]

MAX_LEN, BLOCKS, S = 300, 5, 16


def angles(D: int) -> Tensor:
    turns = torch.arange(MAX_LEN)[:, None] * 0.5 ** torch.arange(D // 2)[None, :]
    return torch.cat((turns.cos(), turns.sin()), dim=1).to(DEVICE)


def places(T: int) -> tuple[Tensor, Tensor]:
    """Positions, some repeated and out of order, and slots of shuffled blocks."""
    generator = torch.Generator().manual_seed(T)
    positions = torch.randint(MAX_LEN, (T,), generator=generator)
    slots = torch.randperm(BLOCKS * S, generator=generator)[:T]
    return positions.to(DEVICE), slots.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("T", "Hq", "Hkv", "D"),
    [(1, 9, 3, 64), (17, 4, 4, 64), (5, 8, 1, 128), (3, 32, 8, 128), (3, 2, 2, 10)],
)
def test_rotation_and_write_equal_the_reference(
    T: int, Hq: int, Hkv: int, D: int, dtype: torch.dtype
) -> None:
    qkv, cos_sin, (positions, slots) = numbers(T, (Hq + 2 * Hkv) * D), angles(D), places(T)
    stored = qkv.to(dtype)
    expected_k, expected_v = poison(BLOCKS, S, Hkv, D), poison(BLOCKS, S, Hkv, D)
    expected = reference.rope_kv_write(
        stored.float(), cos_sin, positions, slots, expected_k, expected_v
    )
    k_cache, v_cache = (poison(BLOCKS, S, Hkv, D, dtype=dtype) for _ in range(2))
    got = kernel.rope_kv_write(stored, cos_sin, positions, slots, k_cache, v_cache)
    assert (got.shape, got.dtype) == ((T, Hq, D), dtype)
    close(got, expected)
    close(k_cache, expected_k, equal_nan=True)  # other slots still hold NaN
    close(v_cache, expected_v, equal_nan=True)


def test_float32_activations_go_to_a_bfloat16_cache_of_wider_slots() -> None:
    T, Hkv, D = 4, 2, 16  # 6 query heads
    qkv, cos_sin, (positions, slots) = spaced(numbers(T, 10 * D)), angles(D), places(T)
    k_cache, v_cache = (
        poison(BLOCKS, S, Hkv + 1, D, dtype=torch.bfloat16)[:, :, 1:] for _ in range(2)
    )
    expected_k, expected_v = poison(BLOCKS, S, Hkv, D), poison(BLOCKS, S, Hkv, D)
    expected = reference.rope_kv_write(
        qkv.contiguous(), cos_sin, positions, slots, expected_k, expected_v
    )
    close(kernel.rope_kv_write(qkv, cos_sin, positions, slots, k_cache, v_cache), expected)
    close(k_cache, expected_k, equal_nan=True)
    close(v_cache, expected_v, equal_nan=True)
    base = k_cache._base
    assert base is not None
    assert base[:, :, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_fp8_cache_takes_what_the_reference_gives_it(dtype: torch.dtype) -> None:
    T, Hq, Hkv, D = 5, 8, 2, 64
    qkv = (numbers(T, (Hq + 2 * Hkv) * D) * torch.logspace(-3, 3, T, device=DEVICE)[:, None]).to(
        dtype
    )
    cos_sin, (positions, slots), scales = angles(D), places(T), CacheScales(0.37, 1.9)
    empty = torch.zeros(BLOCKS, S, Hkv, D, dtype=FP8, device=DEVICE)
    mine, theirs = ((empty.clone(), empty.clone()) for _ in "ab")
    got = kernel.rope_kv_write(qkv, cos_sin, positions, slots, *mine, scales)
    expected = reference.rope_kv_write(qkv.float(), cos_sin, positions, slots, *theirs, scales)
    close(got, expected)
    for page, wanted in zip(mine, theirs, strict=True):
        assert wanted.float().abs().max() == 448.0  # too large a number
        torch.testing.assert_close(page.float(), wanted.float(), atol=2**-9, rtol=2**-3)
        assert (page.float() == wanted.float()).float().mean() > 0.999
