"""EAGLE-1 and EAGLE-2 heads (arXiv:2401.15077, 2406.16858), and the dense head of several ordinary
layers of arXiv:2508.08192."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.heads.contexts import inside, vocabulary
from drafter.heads.interface import DraftBatch, DraftContext
from engine.checkpoints.arch import LlamaArch
from engine.models.layers import DecoderLayer, GatheredLinear, RMSNorm, VocabParallelEmbedding
from engine.parallel.shard import Shard


@dataclass(frozen=True, slots=True)
class EagleHead:
    """Predicts the target's next feature from a token's embedding and the feature before it
    (implements `DraftHead`).

    The state is the stream after the last layer, normalised if there is a `norm` (the dense head).
    The LM head reads it, and it is the feature of the next entry.
    """

    arch: LlamaArch  # of the layers
    shard: Shard  # of the layers and `fc`
    tap_layers: tuple[int, ...]
    embedding: VocabParallelEmbedding
    fc: GatheredLinear  # 2H -> H on [embedding; feature]
    first_norm: RMSNorm | None  # of the first layer's input
    layers: tuple[DecoderLayer, ...]  # the first has no input norm of its own
    norm: RMSNorm | None
    lm_head: GatheredLinear  # H -> V

    @property
    def target_ids(self) -> Tensor | None:
        return None

    def fuse(self, features: tuple[Tensor, ...], ctx: DraftContext) -> Tensor:  # noqa: ARG002
        (feature,) = features
        return feature

    def forward(self, features: Tensor, batch: DraftBatch, ctx: DraftContext) -> Tensor:
        own = inside(ctx, self.shard)
        embedded = self.embedding(batch.token_ids, vocabulary(ctx))
        residual = self.fc(torch.cat((embedded, batch.own(features)), dim=-1), own)  # [C, H]
        x = residual if self.first_norm is None else self.first_norm(residual, own)
        for layer in self.layers:
            x = layer(x, residual, batch, own)
        return x + residual if self.norm is None else self.norm.add(x, residual, own)

    def logits(self, states: Tensor, ctx: DraftContext) -> Tensor:
        return self.lm_head(states, vocabulary(ctx))
