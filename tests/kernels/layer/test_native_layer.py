"""Whole decoder layers in one call give every bit of their separate operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kv.storage import KVStorage
from engine.models.layers import (
    Attention,
    ColumnParallelLinear,
    DecoderLayer,
    GatedMLP,
    RMSNorm,
    RowParallelLinear,
    run_whole,
)
from engine.models.rope import cos_sin_table
from engine.models.weights import WeightPacker
from engine.step.batch import ForwardBatch, ForwardContext
from engine.step.group import TPGroup
from kernels.kv.reference import bits
from kernels.linear.grouped import quantise
from kernels.linear.scaled import FP8
from kernels.ops import UNSCALED, AttentionMeta, CacheScales, LinearWeight, Ops

H, F, HEADS, KV_HEADS, D, BLOCK = 64, 96, 4, 2, 16, 16
CPU = torch.device("cpu")


def packed(ops: Ops, dtype: torch.dtype, form: str, N: int, K: int, seed: int) -> LinearWeight:
    """A weight in three parts; of mixed layouts if `form` says so."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5
    packer = WeightPacker(ops, dtype, CPU, "stored")
    cuts = (weight[: N // 2], weight[N // 2 : -8], weight[-8:])
    if form == "plain":
        return packer.pack(cuts, N, torch.ones(N))
    bits = (4, 4, 8) if form == "mixed" else (4, 4, 4)
    parts = [quantise(part, number) for part, number in zip(cuts, bits, strict=True)]
    return packer.pack(parts, N, torch.ones(N))


def a_layer(
    ops: Ops,
    dtype: torch.dtype,
    form: str,
    input_size: int | None,
    cache: torch.dtype | None = None,
) -> DecoderLayer:
    width = input_size or H
    qkv = packed(ops, dtype, form, (HEADS + 2 * KV_HEADS) * D, width, 1)
    output = packed(ops, dtype, form, H, HEADS * D, 2)
    gate_up, down = packed(ops, dtype, form, 2 * F, H, 3), packed(ops, dtype, form, H, F, 4)
    norms = [RMSNorm(torch.rand(H) + 0.5, 1e-5) for _ in range(2)]
    return DecoderLayer(
        input_norm=None if input_size else norms[0],
        attention=Attention(
            layer=0,
            qkv=ColumnParallelLinear(qkv),
            output=RowParallelLinear(output),
            cos_sin=cos_sin_table(D, 64, 10000.0, None),
            scale=D**-0.5,
            cache=cache or dtype,
            cache_scales=UNSCALED if cache is None else CacheScales(0.25, 2.0),
        ),
        post_attention_norm=norms[1],
        mlp=GatedMLP(ColumnParallelLinear(gate_up), RowParallelLinear(down)),
    )


def whole(layer: DecoderLayer, ops: Ops) -> DecoderLayer:
    assert ops.pack_layer is not None
    return replace(layer, whole=ops.pack_layer(layer.weights))


def a_batch() -> ForwardBatch:
    """A chunk of five tokens after three, and a root with a tree of two branches after twenty."""
    tables = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
    positions = torch.tensor([3, 4, 5, 6, 7, 20, 21, 21, 22])
    slots = torch.tensor([19, 20, 21, 22, 23, 52, 53, 54, 55])
    meta = AttentionMeta(
        cu_q=torch.tensor([0, 5, 9], dtype=torch.int32),
        prefix_lens=torch.tensor([3, 20], dtype=torch.int32),
        first_keys=torch.zeros(2, dtype=torch.int32),
        block_tables=tables,
        ancestors=torch.tensor([0, 0, 0, 0, 0, 0b1, 0b11, 0b101, 0b1011]),
        max_q=5,
        max_context=24,
    )
    return ForwardBatch(torch.zeros(9, dtype=torch.int64), positions, slots, meta)


@pytest.mark.parametrize("form", ["plain", "grouped", "mixed"])
@pytest.mark.parametrize(
    ("input_size", "cache"),
    [(None, None), (128, None), (None, FP8)],
    ids=["with-norm", "prepared-input", "fp8-cache"],
)
def test_one_call_equals_the_operations(
    grouped: Ops, dtype: torch.dtype, form: str, input_size: int | None, cache: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    layer, batch = a_layer(grouped, dtype, form, input_size, cache), a_batch()
    x, residual = torch.randn(9, input_size or H), torch.randn(9, H)
    results = []
    for each in (layer, whole(layer, grouped)):
        kv = KVStorage.allocate(1, 4, BLOCK, KV_HEADS, D, cache or dtype, CPU)
        for number, pages in enumerate((*kv.keys, *kv.values)):
            made = torch.Generator().manual_seed(number)
            pages.copy_(torch.randn(pages.shape, generator=made))
        stream = residual.clone()
        out = each(x.clone(), stream, batch, ForwardContext(grouped, kv, TPGroup()))
        results.append((out, stream, bits(kv.keys[0]), bits(kv.values[0])))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert bool(results[0][0].isfinite().all())


def test_several_layers_in_one_call_equal_the_layers_in_turn(
    grouped: Ops, dtype: torch.dtype
) -> None:
    """The second has other weights, and pages of its own."""
    torch.manual_seed(0)
    batch, results = a_batch(), []
    layers = [a_layer(grouped, dtype, form, None) for form in ("grouped", "mixed")]
    layers[1] = replace(layers[1], attention=replace(layers[1].attention, layer=1))
    x, residual = torch.randn(9, H), torch.randn(9, H)
    tap = torch.full((9, H), torch.nan)
    for together in (False, True):
        kv = KVStorage.allocate(2, 4, BLOCK, KV_HEADS, D, dtype, CPU)
        for pages in (*kv.keys, *kv.values):
            pages.zero_()
        out, stream, context = x.clone(), residual.clone(), ForwardContext(grouped, kv, TPGroup())
        packed_layers = [whole(layer, grouped) for layer in layers]
        if together:
            parts = [layer.whole for layer in packed_layers if layer.whole is not None]
            out = run_whole(parts, slice(0, 2), out, stream, batch, context, {1: tap})
        else:
            for layer in packed_layers:
                entering = out + stream
                out = layer(out, stream, batch, context)
        results.append((out, stream, *kv.keys, *kv.values))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(tap, entering)
