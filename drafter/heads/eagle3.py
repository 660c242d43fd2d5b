"""EAGLE-3 heads (arXiv:2503.01840)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.heads.interface import DraftBatch, DraftContext
from drafter.heads.layer import DraftLayer, follow, whole
from engine.layers.embedding import LMHead, VocabParallelEmbedding
from engine.layers.norm import RMSNorm
from engine.models.arch import LlamaArch
from engine.runner.forward import ForwardContext
from kernels.ops import LinearWeight, Ops


@dataclass(frozen=True, slots=True)
class Eagle3Head:
    """Predicts tokens of a draft vocabulary from a token's embedding and fused features of several
    target layers (implements `DraftHead`). The state is the stream before the final norm."""

    arch: LlamaArch  # of the layers
    tap_layers: tuple[int, ...]
    target_ids: Tensor | None  # [Vd] int64
    embedding: VocabParallelEmbedding
    embedding_norm: RMSNorm
    fc: LinearWeight  # taps * H target -> H
    ops: Ops  # of `fuse`, which has no context
    feature_norm: RMSNorm
    norm_before_residual: bool
    layers: tuple[DraftLayer, ...]  # the first takes [embedding; feature], 2H
    norm: RMSNorm
    lm_head: LMHead  # H -> Vd

    def fuse(self, features: tuple[Tensor, ...]) -> Tensor:
        assert len(features) == len(self.tap_layers)
        return self.ops.linear(torch.cat(features, dim=-1), self.fc)

    def forward(self, features: Tensor, batch: DraftBatch, ctx: DraftContext) -> Tensor:
        inside = whole(ctx)
        x, residual = self._enter(features, batch, inside)
        x = self.layers[0](x, residual, batch, inside)
        return follow(self.layers[1:], x, residual, batch, inside) + residual

    def logits(self, states: Tensor, ctx: DraftContext) -> Tensor:
        inside = whole(ctx)
        return self.lm_head(self.norm(states, inside), inside)

    def _enter(
        self, features: Tensor, batch: DraftBatch, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """The first layer's input [C, 2H] and the residual stream [C, H]."""
        embedded = self.embedding_norm(self.embedding(batch.token_ids, ctx), ctx)
        normed = self.feature_norm(features, ctx)
        x = torch.cat((embedded, normed), dim=-1)
        # Layers add to the stream in place, and the features are the caller's.
        return x, normed if self.norm_before_residual else features.clone()
