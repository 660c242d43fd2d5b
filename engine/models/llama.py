"""Llama 2 and 3.x: a pre-norm decoder with rotary grouped-query attention and SwiGLU."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.stored import ReadStored
from engine.models.footprint import GIB, held_bytes, layers_with_progress
from engine.models.layers import LMHead, RMSNorm, VocabParallelEmbedding, run_whole
from engine.models.loading import LayerLoader
from engine.models.place import Place
from engine.parallel.shard import check_degree, check_experts
from engine.step.batch import ForwardBatch, ForwardContext
from engine.step.taps import LAST_OUTPUT
from kernels.ops import CacheScales, PackedLayer

logger = logging.getLogger(__name__)


class Layer(Protocol):
    """As `DecoderLayer`."""

    @property
    def whole(self) -> PackedLayer | None: ...

    def __call__(
        self, x: Tensor | None, residual: Tensor, batch: ForwardBatch, ctx: ForwardContext
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Llama:
    """A loaded target (implements `TargetModel`)."""

    attention_chunk: ClassVar[None] = None

    arch: LlamaArch
    embedding: VocabParallelEmbedding
    layers: tuple[Layer, ...]
    norm: RMSNorm
    head: LMHead

    def forward(self, batch: ForwardBatch, ctx: ForwardContext) -> Tensor:
        residual = self.embedding(batch.token_ids, ctx)  # [T, H], the stream
        tapped = sorted(_tapped(ctx).intersection(range(len(self.layers))))
        taps = {index: torch.empty_like(residual) for index in tapped}
        x = self._run(residual, batch, ctx, taps)
        for index, hidden in taps.items():
            assert ctx.tap is not None
            ctx.tap.record(index, hidden)
        if LAST_OUTPUT in _tapped(ctx) and ctx.tap is not None:
            ctx.tap.record(LAST_OUTPUT, x + residual)
        hidden = self.norm.add(x, residual, ctx)
        if len(self.layers) in _tapped(ctx) and ctx.tap is not None:
            ctx.tap.record(len(self.layers), hidden)
        return hidden

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        return self.head(hidden, ctx)

    def _run(
        self,
        residual: Tensor,
        batch: ForwardBatch,
        ctx: ForwardContext,
        taps: Mapping[int, Tensor],
    ) -> Tensor:
        """All layers, together if each can be run as a whole. `taps` take the streams that enter
        the layers of these indices. The output of the last one is not yet added to the stream."""
        whole = [layer.whole for layer in self.layers if layer.whole is not None]
        if len(whole) == len(self.layers):
            nothing = torch.zeros_like(residual)
            return run_whole(whole, slice(None), nothing, residual, batch, ctx, taps)
        x: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if index in taps:
                _sum(x, residual, taps[index])
            x = layer(x, residual, batch, ctx)
        assert x is not None, "a decoder without layers"
        return x


def _sum(x: Tensor | None, residual: Tensor, out: Tensor) -> None:
    """Without `x`, the residual stream alone."""
    if x is None:
        out.copy_(residual)
    else:
        torch.add(x, residual, out=out)


def _tapped(ctx: ForwardContext) -> frozenset[int]:
    return frozenset() if ctx.tap is None else ctx.tap.layers


class LlamaLoader:
    """Builds a rank's part of a `Llama` from tensors by Hugging Face name; fuses and packs while
    it reads. ValueError if the model cannot be cut into `shard.size` parts."""

    def __init__(
        self,
        arch: LlamaArch,
        read: ReadStored,
        place: Place,
        max_len: int,
        cache_scales: Mapping[int, CacheScales] | None = None,
    ) -> None:
        check_degree(arch, place.shard.size)
        check_experts(arch, place.experts, place.shard.size)
        self._blocks = LayerLoader.of(arch, read, place, max_len, cache_scales)

    def load(self) -> Llama:
        return load_decoder(self._blocks, self._blocks.decoder_layer)


def load_decoder(blocks: LayerLoader, layer: Callable[[int, str], Layer]) -> Llama:
    """A decoder of the layers that `layer` builds from an index and a prefix of names."""
    place, started = blocks.place, time.monotonic()
    model, num_ranks = _load(blocks, layer), place.shard.size
    place.await_weights()
    if place.shard.rank == 0 and place.device.type != "meta":
        logger.info(
            "loaded %.2f GiB of weights in %.1f s%s",
            held_bytes(model) / GIB,
            time.monotonic() - started,
            "" if num_ranks == 1 else f", on each of {num_ranks} ranks",
        )
    return model


def _load(blocks: LayerLoader, layer: Callable[[int, str], Layer]) -> Llama:
    arch, is_first = blocks.arch, blocks.place.shard.rank == 0
    embedding = blocks.pack_padded("model.embed_tokens", arch.vocab_size)
    tied = arch.tie_word_embeddings
    head = embedding if tied else blocks.pack_padded("lm_head", arch.vocab_size)
    indices = layers_with_progress(arch.num_layers) if is_first else range(arch.num_layers)
    return Llama(
        arch=arch,
        embedding=VocabParallelEmbedding(embedding),
        layers=tuple(layer(index, f"model.layers.{index}") for index in indices),
        norm=blocks.norm("model.norm"),
        head=LMHead(head),
    )
