"""Token embedding and LM head, both parallel over the vocabulary; a tied head shares the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.runner.forward import ForwardContext
from kernels.ops import LinearWeight


@dataclass(frozen=True, slots=True)
class VocabParallelEmbedding:
    weight: LinearWeight  # [V, H]

    def __call__(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.group.all_reduce(ctx.ops.embedding(token_ids, self.weight))  # [T, H]


@dataclass(frozen=True, slots=True)
class LMHead:
    weight: LinearWeight  # [V, H]

    def __call__(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.group.all_gather(ctx.ops.linear(hidden, self.weight).float())  # [R, V] float32
