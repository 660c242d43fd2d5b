"""EAGLE-3 heads (arXiv:2503.01840)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from drafter.heads.contexts import inside, vocabulary
from drafter.heads.interface import DraftBatch, DraftContext
from engine.checkpoints.arch import LlamaArch
from engine.models.layers import DecoderLayer, GatheredLinear, RMSNorm, VocabParallelEmbedding
from engine.parallel.shard import Shard
from engine.step.batch import ForwardContext
from kernels.drafting.nodes import HeadInput


@dataclass(frozen=True, slots=True)
class Fusion:
    """Makes one feature of hidden states of several target layers."""

    layer_norms: tuple[RMSNorm, ...]  # one per layer, or none
    input_norm: RMSNorm | None  # over all layers together
    fc: GatheredLinear  # taps * H target -> H

    def __call__(self, features: tuple[Tensor, ...], ctx: ForwardContext) -> Tensor:
        if self.layer_norms:
            pairs = zip(self.layer_norms, features, strict=True)
            features = tuple(norm(feature, ctx) for norm, feature in pairs)
        x = torch.cat(features, dim=-1)  # [C, taps * H target]
        return self.fc(x if self.input_norm is None else _wide_norm(x, self.input_norm), ctx)


def _wide_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """In plain torch: kernels take no rows as wide as three hidden states."""
    normed = functional.rms_norm(x.float(), x.shape[-1:], norm.weight, norm.eps)
    return normed.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Eagle3Head:
    """Predicts tokens of a draft vocabulary from a token's embedding and fused features of several
    target layers (implements `DraftHead`). The state is the stream before the final norm, or with
    `norm_output` after it."""

    arch: LlamaArch  # of the layers
    shard: Shard  # of the layers and `fc`
    tap_layers: tuple[int, ...]
    target_ids: Tensor | None  # [Vd] int64
    embedding: VocabParallelEmbedding
    embedding_norm: RMSNorm
    fusion: Fusion | None  # None: the feature is the target's hidden state itself
    feature_norm: RMSNorm
    norm_before_residual: bool
    layers: tuple[DecoderLayer, ...]  # the first takes [embedding; feature], 2H
    norm: RMSNorm
    norm_output: bool
    lm_head: GatheredLinear  # H -> Vd

    def fuse(self, features: tuple[Tensor, ...], ctx: DraftContext) -> Tensor:
        assert len(features) == len(self.tap_layers)
        if self.fusion is None:
            return features[0]
        return self.fusion(features, inside(ctx, self.shard))

    def forward(self, features: Tensor, batch: DraftBatch, ctx: DraftContext) -> Tensor:
        own = inside(ctx, self.shard)
        x, residual = self._enter(features, batch, ctx)
        for layer in self.layers:
            x = layer(x, residual, batch, own)
        return self.norm.add(x, residual, own) if self.norm_output else x + residual

    def logits(self, states: Tensor, ctx: DraftContext) -> Tensor:
        whole = vocabulary(ctx)
        normed = states if self.norm_output else self.norm(states, whole)
        return self.lm_head(normed, whole)

    def _enter(
        self, features: Tensor, batch: DraftBatch, ctx: DraftContext
    ) -> tuple[Tensor, Tensor]:
        """The first layer's input [C, 2H] and the residual stream [C, H]."""
        whole, enter = vocabulary(ctx), ctx.ops.enter_head
        if enter is not None and whole.group.size == 1 and self.embedding.weight.layout is None:
            return enter(self._input(features, batch), self.embedding.weight)
        embedded = self.embedding_norm(self.embedding(batch.token_ids, whole), whole)
        features = batch.own(features)
        normed = self.feature_norm(features, whole)
        x = torch.cat((embedded, normed), dim=-1)
        # Layers add to the stream in place, but the features belong to the caller.
        return x, normed if self.norm_before_residual else features.clone()

    def _input(self, features: Tensor, batch: DraftBatch) -> HeadInput:
        return HeadInput(
            token_ids=batch.token_ids,
            features=features,
            feature_of=batch.feature_of,
            embedding_norm=self.embedding_norm.weight,
            embedding_eps=self.embedding_norm.eps,
            feature_norm=self.feature_norm.weight,
            feature_eps=self.feature_norm.eps,
            normed_residual=self.norm_before_residual,
        )
