"""A cache of keys and values in FP8 on the CPU: every number, and attention over them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import reference as attention
from kernels.kv import reference as kv
from kernels.linear.scaled import FP8
from kernels.ops import UNSCALED, AttentionMeta, CacheScales, Ops
from kernels.rope import reference as rope
from tests.kernels.native.test_native import TOLERANCE, numbers, paged, random_tree_masks

SCALES = CacheScales(0.37, 1.9)
NUMBERS = torch.cat(
    [
        torch.arange(256, dtype=torch.uint8).view(FP8).float(),
        torch.linspace(-0.04, 0.04, 5001),  # smallest numbers, and halves between them
        torch.linspace(-500.0, 500.0, 5001),
        torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-30, 464.0, 1e30, -0.0]),
    ]
)


def fp8(pages: Tensor) -> Tensor:
    return pages.float().to(FP8)


def written(ops: Ops, x: Tensor, scales: CacheScales) -> Tensor:
    """What a cache holds of the keys and values x [T, D], which are not rotated."""
    T, D = x.shape
    pages = [torch.zeros(-(-T // 16), 16, 1, D, dtype=FP8) for _ in "kv"]
    still = torch.cat((torch.ones(1, D // 2), torch.zeros(1, D // 2)), dim=1)
    places = torch.zeros(T, dtype=torch.int64), torch.arange(T)
    ops.rope_kv_write(x.repeat(1, 3), still, *places, *pages, scales)
    return torch.stack([page.view(torch.uint8).flatten(0, 2)[:T] for page in pages])


@pytest.mark.parametrize("scales", [UNSCALED, SCALES])
def test_numbers_are_rounded_as_the_reference_rounds(
    native: Ops, reference_ops: Ops, scales: CacheScales
) -> None:
    x = NUMBERS[: len(NUMBERS) // 24 * 24].view(-1, 24).float()
    x = torch.cat((x, NUMBERS[-24:][None]))
    expected = torch.stack([kv.as_kept(x, scale, FP8).view(torch.uint8) for scale in scales])
    assert torch.equal(written(reference_ops, x, scales)[1], expected[1])
    for got in written(native, x, scales), written(reference_ops, x, scales):
        isnan = expected & 0x7F == 0x7F
        # Rotation by nothing multiplies infinity by zero.
        finite = x.isfinite().all(dim=1)
        assert torch.equal((got & 0x7F == 0x7F)[1], isnan[1])
        assert torch.equal(got[0, finite] & 0x7F, expected[0, finite] & 0x7F)
        assert torch.equal(got[1].where(~isnan[1], 0), expected[1].where(~isnan[1], 0))


@pytest.mark.parametrize("D", [64, 40])
def test_every_number_is_read(native: Ops, D: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    count = -(-256 // D)
    pages = torch.zeros(count, 16, 1, D, dtype=torch.uint8)
    pages[:, 0, 0] = torch.cat((codes, codes[: count * D - 256])).view(count, D)
    meta = AttentionMeta(
        cu_q=torch.arange(count + 1, dtype=torch.int32),
        prefix_lens=torch.zeros(count, dtype=torch.int32),
        first_keys=torch.zeros(count, dtype=torch.int32),
        block_tables=torch.arange(count, dtype=torch.int32)[:, None],
        ancestors=torch.zeros(count, dtype=torch.int64),
        max_q=1,
        max_context=1,
    )
    keys = torch.zeros(count, 16, 1, D, dtype=FP8)
    got = native.attention(numbers(count, 1, D), keys, pages.view(FP8), meta, 1.0, UNSCALED)
    expected = pages[:, 0, 0].view(FP8).float()
    assert torch.equal(got.where(~expected.isnan(), 0.0), expected.where(~expected.isnan(), 0.0))
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize(("heads", "kv_heads", "D"), [(9, 3, 64), (6, 2, 80), (3, 1, 24)])
def test_attention_equals_the_reference(native: Ops, heads: int, kv_heads: int, D: int) -> None:
    rows = [(40, 20), (250, 7), (513, 3), (0, 16)]
    keys, values, meta = paged(rows, kv_heads, D, torch.float32)
    masks = [mask for row, (_, n) in enumerate(rows[:3]) for mask in random_tree_masks(n, row)]
    meta = replace(meta, ancestors=torch.tensor(masks + [0] * 16))
    q = numbers(len(meta.ancestors), heads, D)
    inputs = (q, fp8(keys), fp8(values), meta, D**-0.5, SCALES)
    got, expected = native.attention(*inputs), attention.attention(*inputs)
    torch.testing.assert_close(got, expected, atol=TOLERANCE["attention"], rtol=1e-5)
    whole = [page.float() * scale for page, scale in zip(inputs[1:3], SCALES, strict=True)]
    plain = attention.attention(q, *whole, meta, D**-0.5)
    torch.testing.assert_close(got, plain, atol=2 * TOLERANCE["attention"], rtol=1e-5)


def test_rotated_keys_are_those_of_the_reference(native: Ops) -> None:
    T, D = 21, 64
    qkv, cos_sin = numbers(T, 15 * D), numbers(64, D, seed=1)
    slots = torch.randperm(5 * 16, generator=torch.Generator().manual_seed(2))[:T]
    caches = [[torch.zeros(5, 16, 3, D, dtype=FP8) for _ in "kv"] for _ in "ab"]
    for write, pages in zip((native.rope_kv_write, rope.rope_kv_write), caches, strict=True):
        write(qkv, cos_sin, torch.arange(T) * 3, slots, *pages, SCALES)
    for mine, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), atol=1e-3, rtol=2**-3)
        assert (mine.float() == theirs.float()).float().mean() > 0.999


def test_slots_move(native: Ops) -> None:
    pages = [numbers(4, 16, 3, 64, seed=seed).to(FP8) for seed in range(2)]
    expected = [page.clone() for page in pages]
    moves = torch.tensor([5, 9, 40]), torch.tensor([5, 6, 33])
    kv.kv_move(expected, *moves)
    native.kv_move(pages, *moves)
    for got, wanted in zip(pages, expected, strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
