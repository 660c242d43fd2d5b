"""Llama 2 and 3.x: a pre-norm decoder with rotary grouped-query attention and SwiGLU."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.stored import ReadStored
from engine.models.footprint import GIB, held_bytes, layers_with_progress
from engine.models.layers import (
    Attention,
    GatedMLP,
    LMHead,
    RMSNorm,
    VocabParallelEmbedding,
    cos_sin_table,
)
from engine.models.loading import LayerLoader
from engine.parallel.shard import WHOLE, Shard, check_degree
from engine.step.batch import ForwardBatch, ForwardContext
from kernels.ops import Ops

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self, x: Tensor, residual: Tensor, batch: ForwardBatch, ctx: ForwardContext
    ) -> Tensor:
        """Take the last block's output and the residual stream, both [T, H]; add the output to the
        stream in place. Return this block's output, not yet added."""
        x = self.attention(self.input_norm.add(x, residual, ctx), batch, ctx)
        return self.mlp(self.post_attention_norm.add(x, residual, ctx), ctx)


@dataclass(frozen=True, slots=True)
class Llama:
    """A loaded target (implements `TargetModel`)."""

    arch: LlamaArch
    embedding: VocabParallelEmbedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: LMHead

    def forward(self, batch: ForwardBatch, ctx: ForwardContext) -> Tensor:
        x = self.embedding(batch.token_ids, ctx)  # [T, H]
        residual = torch.zeros_like(x)
        for index, layer in enumerate(self.layers):
            self._tap(index, x, residual, ctx)
            x = layer(x, residual, batch, ctx)
        hidden = self.norm.add(x, residual, ctx)
        if ctx.tap is not None and len(self.layers) in ctx.tap.layers:
            ctx.tap.record(len(self.layers), hidden)
        return hidden

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        return self.head(hidden, ctx)

    @staticmethod
    def _tap(index: int, x: Tensor, residual: Tensor, ctx: ForwardContext) -> None:
        if ctx.tap is not None and index in ctx.tap.layers:
            ctx.tap.record(index, x + residual)


class LlamaLoader:
    """Builds a rank's part of a `Llama` from tensors by Hugging Face name; fuses and packs while
    it reads. ValueError if the model cannot be cut into `shard.size` parts."""

    def __init__(
        self,
        arch: LlamaArch,
        read: ReadStored,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        max_len: int,
        shard: Shard = WHOLE,
    ) -> None:
        check_degree(arch, shard.size)
        self._arch = arch
        self._shard = shard
        cos_sin = cos_sin_table(arch.head_dim, max_len, arch.rope_theta, arch.rope_scaling)
        self._blocks = LayerLoader(arch, read, ops, dtype, device, cos_sin.to(device), shard)

    def load(self) -> Llama:
        started = time.monotonic()
        model = self._load()
        if self._shard.rank == 0 and self._blocks.device.type != "meta":
            logger.info(
                "loaded %.2f GiB of weights in %.1f s%s",
                held_bytes(model) / GIB,
                time.monotonic() - started,
                "" if self._shard.size == 1 else f", on each of {self._shard.size} ranks",
            )
        return model

    def _load(self) -> Llama:
        arch = self._arch
        embedding = self._blocks.pack_padded("model.embed_tokens", arch.vocab_size)
        tied = arch.tie_word_embeddings
        head = embedding if tied else self._blocks.pack_padded("lm_head", arch.vocab_size)
        return Llama(
            arch=arch,
            embedding=VocabParallelEmbedding(embedding),
            layers=tuple(self._layer(index) for index in self._indices()),
            norm=self._blocks.norm("model.norm"),
            head=LMHead(head),
        )

    def _indices(self) -> Iterable[int]:
        num_layers = self._arch.num_layers
        return layers_with_progress(num_layers) if self._shard.rank == 0 else range(num_layers)

    def _layer(self, index: int) -> DecoderLayer:
        prefix, blocks = f"model.layers.{index}", self._blocks
        return DecoderLayer(
            input_norm=blocks.norm(f"{prefix}.input_layernorm"),
            attention=blocks.attention(index, f"{prefix}.self_attn"),
            post_attention_norm=blocks.norm(f"{prefix}.post_attention_layernorm"),
            mlp=blocks.mlp(f"{prefix}.mlp"),
        )
