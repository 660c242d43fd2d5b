"""The layers of a Llama: each calls a few operations of the kernel table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.step.batch import ForwardContext
from kernels.ops import AttentionMeta, CacheScales, LayerWeights, LinearWeight, PackedLayer


@dataclass(frozen=True, slots=True)
class ColumnParallelLinear:
    """Each rank holds a slice of the outputs; the input is whole on every rank."""

    weight: LinearWeight

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.ops.linear(x, self.weight)  # [T, N / ranks]


@dataclass(frozen=True, slots=True)
class GatheredLinear:
    """Each rank computes equally many outputs (see `Shard.padded`), then all ranks gather them:
    input and output are whole on every rank."""

    weight: LinearWeight
    num_outputs: int  # N; if ranks do not divide it, they compute a few more together

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        outputs = ctx.group.all_gather(ctx.ops.linear(x, self.weight))
        return outputs[..., : self.num_outputs].contiguous()  # [T, N]


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """Each rank holds a slice of the inputs; partial outputs are summed over ranks."""

    weight: LinearWeight

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.group.all_reduce(self.partial(x, ctx))  # [T, N]

    def partial(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """This rank's summand of the output."""
        return ctx.ops.linear(x, self.weight)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467)."""

    weight: Tensor  # [H] float32
    eps: float

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor | None, residual: Tensor, ctx: ForwardContext) -> Tensor:
        """Add `x`, if any, to `residual` in place and return the normalised sum."""
        if x is None:
            return self(residual, ctx)
        return ctx.ops.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class VocabParallelEmbedding:
    """Each rank holds equally many rows and adds zeros for tokens of other ranks."""

    weight: LinearWeight  # [V / ranks, H], padded on the last ranks (see `Shard.padded`)

    def __call__(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        width = self.weight.out_features
        if ctx.group.size == 1:
            return ctx.ops.embedding(token_ids, self.weight)  # [T, H]
        local = token_ids - ctx.group.rank * width
        held = (local >= 0) & (local < width)
        rows = ctx.ops.embedding(local.clamp(0, width - 1), self.weight)
        return ctx.group.all_reduce(rows * held.unsqueeze(-1))


@dataclass(frozen=True, slots=True)
class LMHead:
    """Each rank computes the logits of its rows, including padding rows after the vocabulary."""

    weight: LinearWeight  # [V / ranks, H], padded like the embedding

    def __call__(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.ops.linear(hidden, self.weight).float()  # [R, V / ranks] float32


class AttentionInputs(Protocol):
    """The inputs of attention: the target's `ForwardBatch`, or a drafter's own type."""

    @property
    def positions(self) -> Tensor: ...  # [T] int64

    @property
    def slots(self) -> Tensor: ...  # [T] int64, where each entry's KV goes

    @property
    def attention(self) -> AttentionMeta: ...


@dataclass(frozen=True, slots=True)
class Attention:
    """One product for queries, keys and values; one operation for rotation and cache write."""

    layer: int
    qkv: ColumnParallelLinear  # H -> (Hq + 2 Hkv) D
    output: RowParallelLinear  # Hq D -> H
    cos_sin: Tensor  # [max_len, D] float32
    scale: float
    cache: torch.dtype
    cache_scales: CacheScales

    def __call__(self, x: Tensor, batch: AttentionInputs, ctx: ForwardContext) -> Tensor:
        keys, values = ctx.kv.keys[self.layer], ctx.kv.values[self.layer]
        places = (batch.positions, batch.slots, keys, values, self.cache_scales)
        queries = ctx.ops.rope_kv_write(self.qkv(x, ctx), self.cos_sin, *places)  # [T, Hq, D]
        pages = (keys, values, batch.attention, self.scale, self.cache_scales)
        mixed = ctx.ops.attention(queries, *pages)
        return self.output(mixed, ctx)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product (SwiGLU, arXiv:2002.05202)."""

    gate_up: ColumnParallelLinear  # H -> 2F, gate rows first
    down: RowParallelLinear  # F -> H

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.group.all_reduce(self.partial(x, ctx))

    def partial(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """This rank's summand of the output."""
        return self.down.partial(ctx.ops.silu_and_mul(self.gate_up(x, ctx)), ctx)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and feed-forward over a residual stream."""

    input_norm: RMSNorm | None
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: GatedMLP
    whole: PackedLayer | None = None  # all of it as one call, if this rank needs no other

    @property
    def weights(self) -> LayerWeights:
        """What `ops.pack_layer` takes."""
        return LayerWeights(
            input_norm=None if self.input_norm is None else self.input_norm.weight,
            post_norm=self.post_attention_norm.weight,
            eps=self.post_attention_norm.eps,
            qkv=self.attention.qkv.weight,
            output=self.attention.output.weight,
            gate_up=self.mlp.gate_up.weight,
            down=self.mlp.down.weight,
            cos_sin=self.attention.cos_sin,
            scale=self.attention.scale,
            cache=self.attention.cache,
            cache_scales=self.attention.cache_scales,
        )

    def __call__(
        self, x: Tensor | None, residual: Tensor, batch: AttentionInputs, ctx: ForwardContext
    ) -> Tensor:
        """Take the last block's output and the residual stream, both [T, H]; add the output to the
        stream in place. Return this block's output, not yet added. `x` None: no block before.

        Without an input norm `x` is the input of attention itself, of any width, and is not added.
        """
        if self.whole is not None:
            layer, added = self.attention.layer, torch.zeros_like(residual) if x is None else x
            return run_whole([self.whole], slice(layer, layer + 1), added, residual, batch, ctx, {})
        if self.input_norm is not None:
            x = self.input_norm.add(x, residual, ctx)
        assert x is not None, "the input of attention"
        x = self.attention(x, batch, ctx)
        return self.mlp(self.post_attention_norm.add(x, residual, ctx), ctx)


def run_whole(
    layers: Sequence[PackedLayer],
    pages: slice,
    x: Tensor,
    residual: Tensor,
    batch: AttentionInputs,
    ctx: ForwardContext,
    taps: Mapping[int, Tensor],
) -> Tensor:
    """Consecutive layers in one call; `pages` are theirs in the KV cache. See `DecoderLayer`, and
    `Ops.decoder_layers` for `taps`."""
    assert ctx.ops.decoder_layers is not None
    kv = ctx.kv.keys[pages], ctx.kv.values[pages]
    inputs = (batch.positions, batch.slots, batch.attention, *kv)
    return ctx.ops.decoder_layers(layers, x, residual, *inputs, taps)
