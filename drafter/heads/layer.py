"""The decoder layer of draft heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from drafter.heads.interface import DraftBatch, DraftContext
from engine.models.layers import Attention, GatedMLP, RMSNorm
from engine.parallel.shard import Shard
from engine.step.batch import ForwardContext
from engine.step.group import TPGroup


@dataclass(frozen=True, slots=True)
class DraftLayer:
    """Attention and feed-forward over a residual stream. The norm before the layer depends on the
    head and on the layer's place, so the caller applies it."""

    input_norm: RMSNorm | None  # None: the layer takes the stream as it is
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self, x: Tensor, residual: Tensor, batch: DraftBatch, ctx: ForwardContext
    ) -> Tensor:
        """Take the prepared input [C, H or 2H] and the residual stream [C, H], which is updated in
        place; return this layer's output, not yet added to the stream."""
        x = self.attention(x, batch, ctx)
        return self.mlp(self.post_attention_norm.add(x, residual, ctx), ctx)


def follow(
    layers: tuple[DraftLayer, ...],
    x: Tensor,
    residual: Tensor,
    batch: DraftBatch,
    ctx: ForwardContext,
) -> Tensor:
    """Run ordinary layers after a layer whose output is `x`."""
    for layer in layers:
        assert layer.input_norm is not None, "only the first layer of a head may lack this norm"
        x = layer(layer.input_norm.add(x, residual, ctx), residual, batch, ctx)
    return x


def vocabulary(ctx: DraftContext) -> ForwardContext:
    """The context of embedding and LM head, which are cut over ranks like the target's."""
    return ForwardContext(ctx.ops, ctx.kv, ctx.group)


def inside(ctx: DraftContext, shard: Shard) -> ForwardContext:
    """The context of layers cut as in `shard`: over all ranks, or whole on each."""
    return ForwardContext(ctx.ops, ctx.kv, TPGroup() if shard.size == 1 else ctx.group)
