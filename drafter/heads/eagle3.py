"""EAGLE-3 heads (arXiv:2503.01840)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.heads.interface import DraftBatch, DraftContext
from drafter.heads.layer import DraftLayer, follow, inside, vocabulary
from engine.checkpoints.arch import LlamaArch
from engine.models.layers import GatheredLinear, RMSNorm, VocabParallelEmbedding
from engine.parallel.shard import Shard


@dataclass(frozen=True, slots=True)
class Eagle3Head:
    """Predicts tokens of a draft vocabulary from a token's embedding and fused features of several
    target layers (implements `DraftHead`). The state is the stream before the final norm."""

    arch: LlamaArch  # of the layers
    shard: Shard  # of the layers and `fc`
    tap_layers: tuple[int, ...]
    target_ids: Tensor | None  # [Vd] int64
    embedding: VocabParallelEmbedding
    embedding_norm: RMSNorm
    fc: GatheredLinear  # taps * H target -> H
    feature_norm: RMSNorm
    norm_before_residual: bool
    layers: tuple[DraftLayer, ...]  # the first takes [embedding; feature], 2H
    norm: RMSNorm
    lm_head: GatheredLinear  # H -> Vd

    def fuse(self, features: tuple[Tensor, ...], ctx: DraftContext) -> Tensor:
        assert len(features) == len(self.tap_layers)
        return self.fc(torch.cat(features, dim=-1), inside(ctx, self.shard))

    def forward(self, features: Tensor, batch: DraftBatch, ctx: DraftContext) -> Tensor:
        own = inside(ctx, self.shard)
        x, residual = self._enter(features, batch, ctx)
        x = self.layers[0](x, residual, batch, own)
        return follow(self.layers[1:], x, residual, batch, own) + residual

    def logits(self, states: Tensor, ctx: DraftContext) -> Tensor:
        whole = vocabulary(ctx)
        return self.lm_head(self.norm(states, whole), whole).float()

    def _enter(
        self, features: Tensor, batch: DraftBatch, ctx: DraftContext
    ) -> tuple[Tensor, Tensor]:
        """The first layer's input [C, 2H] and the residual stream [C, H]."""
        whole = vocabulary(ctx)
        embedded = self.embedding_norm(self.embedding(batch.token_ids, whole), whole)
        normed = self.feature_norm(features, whole)
        x = torch.cat((embedded, normed), dim=-1)
        # Layers add to the stream in place, but the features belong to the caller.
        return x, normed if self.norm_before_residual else features.clone()
