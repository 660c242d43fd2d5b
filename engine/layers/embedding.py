"""Token embedding and LM head, both parallel over the vocabulary; a tied head shares the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.runner.forward import ForwardContext
from kernels.ops import LinearWeight


@dataclass(frozen=True, slots=True)
class VocabParallelEmbedding:
    """Each rank holds equally many rows; those of other ranks' tokens count as zeros."""

    weight: LinearWeight  # [V / ranks, H], the last ranks' filled up (see `Shard.padded`)

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
    """Each rank makes the logits of its rows, those behind the end of the vocabulary included."""

    weight: LinearWeight  # [V / ranks, H], filled up as the embedding's

    def __call__(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.ops.linear(hidden, self.weight).float()  # [R, V / ranks] float32
