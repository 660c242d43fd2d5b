"""DFlash heads (arXiv:2602.06036): a block of masked tokens, guessed at once, attends to keys and
values that every layer makes of the target's features."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafter.heads.contexts import inside, vocabulary
from drafter.heads.interface import DraftBatch, DraftBlock, DraftContext
from engine.checkpoints.arch import LlamaArch
from engine.models.layers import (
    ColumnParallelLinear,
    GatedMLP,
    GatheredLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from engine.parallel.shard import Shard
from engine.step.batch import ForwardContext
from kernels.ops import UNSCALED


@dataclass(frozen=True, slots=True)
class BlockAttention:
    """Attention as in Qwen3, whose queries and keys have norms. A token of the block makes its
    keys and values from the stream; the committed tokens' come from the target's features."""

    layer: int
    queries: ColumnParallelLinear  # H -> Hq D
    keys_values: ColumnParallelLinear  # H -> 2 Hkv D
    query_norm: RMSNorm  # over D
    key_norm: RMSNorm
    output: RowParallelLinear  # Hq D -> H
    cos_sin: Tensor  # [max_len, D] float32
    scale: float

    def take(self, fused: Tensor, batch: DraftBatch, ctx: ForwardContext) -> None:
        """Write the keys and values of features [C, H]."""
        nobody = fused.new_zeros(len(fused), self.queries.weight.out_features)
        self._write(nobody, fused, batch, ctx)

    def __call__(self, x: Tensor, batch: DraftBatch, ctx: ForwardContext) -> Tensor:
        queries = _each_head(self.query_norm, self.queries(x, ctx), ctx)
        rotated = self._write(queries, x, batch, ctx)
        pages = ctx.kv.keys[self.layer], ctx.kv.values[self.layer]
        meta, scale = batch.attention, self.scale
        return self.output(ctx.ops.attention(rotated, *pages, meta, scale, UNSCALED), ctx)

    def _write(self, queries: Tensor, x: Tensor, batch: DraftBatch, ctx: ForwardContext) -> Tensor:
        """Store keys and values of `x` [C, H]; return the rotated queries."""
        keys, values = self.keys_values(x, ctx).chunk(2, dim=-1)
        keys = _each_head(self.key_norm, keys.contiguous(), ctx)
        return ctx.ops.rope_kv_write(
            torch.cat((queries, keys, values), dim=-1),
            self.cos_sin,
            batch.positions,
            batch.slots,
            ctx.kv.keys[self.layer],
            ctx.kv.values[self.layer],
            UNSCALED,
        )


def _each_head(norm: RMSNorm, x: Tensor, ctx: ForwardContext) -> Tensor:
    heads = x.view(-1, len(norm.weight))
    return norm(heads, ctx).view(x.shape)


@dataclass(frozen=True, slots=True)
class BlockLayer:
    """A decoder layer over the block."""

    input_norm: RMSNorm
    attention: BlockAttention
    post_attention_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self, x: Tensor, residual: Tensor, batch: DraftBatch, ctx: ForwardContext
    ) -> Tensor:
        """As `DecoderLayer`: adds `x` to the stream, and returns an output not yet added."""
        x = self.attention(self.input_norm.add(x, residual, ctx), batch, ctx)
        return self.mlp(self.post_attention_norm.add(x, residual, ctx), ctx)


@dataclass(frozen=True, slots=True)
class DFlashHead:
    """Implements `ParallelHead`. The entry of token i holds the keys and values of the target's
    feature of token i - 1, at that token's position, so a root's entry ends its context. The block
    is the root and a mask for every token to be guessed; each sees the whole block."""

    arch: LlamaArch  # of the layers
    shard: Shard  # of the layers and `fc`
    tap_layers: tuple[int, ...]
    target_ids: Tensor | None  # [Vd] int64
    embedding: VocabParallelEmbedding
    fc: GatheredLinear  # taps * H -> H
    fused_norm: RMSNorm
    layers: tuple[BlockLayer, ...]
    norm: RMSNorm
    lm_head: GatheredLinear  # H -> Vd
    mask_token: int

    def fuse(self, features: tuple[Tensor, ...], ctx: DraftContext) -> Tensor:
        own = inside(ctx, self.shard)
        return self.fused_norm(self.fc(torch.cat(features, dim=-1), own), own)

    def forward(self, features: Tensor, batch: DraftBatch, ctx: DraftContext) -> Tensor:
        """Write what the layers make of the features. A state is the feature itself: drafting
        starts from tokens, but it shows whether the feature is finite."""
        own = inside(ctx, self.shard)
        before, features = replace(batch, positions=batch.positions - 1), batch.own(features)
        for layer in self.layers:
            layer.attention.take(features, before, own)
        return features

    def logits(self, states: Tensor, ctx: DraftContext) -> Tensor:
        return self.lm_head(states, vocabulary(ctx))

    def block(self, root_tokens: Tensor, depth: int) -> DraftBlock | None:
        masks = torch.full_like(root_tokens, self.mask_token)[:, None].expand(-1, depth)
        ids = torch.cat((root_tokens[:, None], masks), dim=1)
        return DraftBlock(ids, first_position=0, causal=False)

    def draft(
        self, root_states: Tensor, batch: DraftBatch | None, depth: int, ctx: DraftContext
    ) -> Tensor:
        assert batch is not None
        own = inside(ctx, self.shard)
        x = self.embedding(batch.token_ids, vocabulary(ctx))  # [B * (depth + 1), H]
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x, residual, batch, own)
        states = self.norm.add(x, residual, own)
        return states.view(len(root_states), depth + 1, -1)[:, 1:]
