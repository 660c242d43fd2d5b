"""EAGLE-1 and EAGLE-2 heads (arXiv:2401.15077, 2406.16858), and the dense head of several ordinary
layers of arXiv:2508.08192."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.heads.interface import DraftBatch, DraftContext
from drafter.heads.layer import DraftLayer, follow, whole
from engine.layers.embedding import LMHead, VocabParallelEmbedding
from engine.layers.linear import ColumnParallelLinear
from engine.layers.norm import RMSNorm
from engine.models.arch import LlamaArch


@dataclass(frozen=True, slots=True)
class EagleHead:
    """Predicts the target's next feature from a token's embedding and the feature before it
    (implements `DraftHead`).

    Without `norm`, the stream behind the last layer is the state. With `norm` (the dense head), the
    normalised stream is. The state goes to the LM head and back in as the next feature.
    """

    arch: LlamaArch  # of the layers
    tap_layers: tuple[int, ...]
    embedding: VocabParallelEmbedding
    fc: ColumnParallelLinear  # 2H -> H on [embedding; feature]
    layers: tuple[DraftLayer, ...]
    norm: RMSNorm | None
    lm_head: LMHead

    @property
    def target_ids(self) -> Tensor | None:
        return None

    def fuse(self, features: tuple[Tensor, ...]) -> Tensor:
        (feature,) = features
        return feature

    def forward(self, features: Tensor, batch: DraftBatch, ctx: DraftContext) -> Tensor:
        inside = whole(ctx)
        embedded = self.embedding(batch.token_ids, inside)
        residual = self.fc(torch.cat((embedded, features), dim=-1), inside)  # [C, H]
        first = self.layers[0]
        x = residual if first.input_norm is None else first.input_norm(residual, inside)
        x = first(x, residual, batch, inside)
        x = follow(self.layers[1:], x, residual, batch, inside)
        return x + residual if self.norm is None else self.norm.add(x, residual, inside)

    def logits(self, states: Tensor, ctx: DraftContext) -> Tensor:
        return self.lm_head(states, whole(ctx))
