"""Llama 4's text model: some layers without positions, local attention in the others, and a mixture
of experts instead of some or all feed-forward blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.llama4_arch import EXPERTS, AttentionTemperature, Llama4Arch
from engine.checkpoints.rotary import PairedRows
from engine.checkpoints.stored import ReadStored, Stored
from engine.models.chunks import with_chunks
from engine.models.layers import (
    ColumnParallelLinear,
    GatedMLP,
    LMHead,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from engine.models.llama import Llama, load_decoder
from engine.models.loading import ALL, LayerLoader
from engine.models.place import Place
from engine.parallel.shard import check_degree, check_experts
from engine.step.batch import ForwardBatch, ForwardContext
from kernels.linear.quantised import Part, dense
from kernels.ops import CacheScales, ExpertWeights, LinearWeight


@dataclass(frozen=True, slots=True)
class QKNorm:
    """x / sqrt(mean(x^2) + eps) of every query and key head."""

    ones: Tensor  # [D] float32
    eps: float

    def __call__(self, qkv: Tensor, num_heads: int, ctx: ForwardContext) -> Tensor:
        """Change the first `num_heads` heads of qkv [T, (Hq + 2 Hkv) D] in place."""
        heads = qkv.view(len(qkv), -1, len(self.ones))[:, :num_heads]
        normed = ctx.ops.rms_norm(heads.reshape(-1, len(self.ones)), self.ones, self.eps)
        heads.copy_(normed.view_as(heads))
        return qkv


@dataclass(frozen=True, slots=True)
class Llama4Attention:
    """Attention of either kind of layer."""

    layer: int
    qkv: ColumnParallelLinear  # H -> (Hq + 2 Hkv) D
    output: RowParallelLinear  # Hq D -> H
    cos_sin: Tensor  # [max_len, D] float32; [1, D], which changes nothing, without positions
    norm: QKNorm | None
    temperatures: Tensor | None  # [max_len] float32: factors of the queries
    is_chunked: bool
    scale: float
    cache_scales: CacheScales

    def __call__(self, x: Tensor, batch: ForwardBatch, ctx: ForwardContext) -> Tensor:
        keys, values = ctx.kv.keys[self.layer], ctx.kv.values[self.layer]
        qkv = self.qkv(x, ctx)
        if self.norm is not None:
            # The model normalises after the rotation, which changes no length: the same.
            num_heads = qkv.shape[1] // keys.shape[3] - keys.shape[2]
            qkv = self.norm(qkv, num_heads, ctx)
        positions = batch.positions if len(self.cos_sin) > 1 else torch.zeros_like(batch.positions)
        places = (positions, batch.slots, keys, values, self.cache_scales)
        queries = ctx.ops.rope_kv_write(qkv, self.cos_sin, *places)  # [T, Hq, D]
        if self.temperatures is not None:
            queries.mul_(self.temperatures[batch.positions, None, None])
        meta = batch.attention
        if self.is_chunked and batch.chunked is not None:
            meta = batch.chunked
        pages = (keys, values, meta, self.scale, self.cache_scales)
        return self.output(ctx.ops.attention(queries, *pages), ctx)


@dataclass(frozen=True, slots=True)
class RoutedMLP:
    """A block that all tokens use, plus one that the router picks for each token."""

    router: LinearWeight  # H -> E
    experts: ExpertWeights  # a slice of every expert's width, or some whole experts
    shared: GatedMLP

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        routed = ctx.ops.moe(x, ctx.ops.linear(x, self.router), self.experts)
        return ctx.group.all_reduce(routed + self.shared.partial(x, ctx))


@dataclass(frozen=True, slots=True)
class Llama4Layer:
    """Attention and feed-forward over a residual stream."""

    whole: ClassVar[None] = None

    input_norm: RMSNorm
    attention: Llama4Attention
    post_attention_norm: RMSNorm
    feed_forward: GatedMLP | RoutedMLP

    def __call__(
        self, x: Tensor | None, residual: Tensor, batch: ForwardBatch, ctx: ForwardContext
    ) -> Tensor:
        x = self.attention(self.input_norm.add(x, residual, ctx), batch, ctx)
        return self.feed_forward(self.post_attention_norm.add(x, residual, ctx), ctx)


@dataclass(frozen=True, slots=True)
class Llama4:
    """A loaded target (implements `TargetModel`)."""

    decoder: Llama
    attention_chunk: int | None

    @property
    def arch(self) -> LlamaArch:
        return self.decoder.arch

    @property
    def embedding(self) -> VocabParallelEmbedding:
        return self.decoder.embedding

    @property
    def head(self) -> LMHead:
        return self.decoder.head

    def forward(self, batch: ForwardBatch, ctx: ForwardContext) -> Tensor:
        return self.decoder.forward(with_chunks(batch, self.attention_chunk), ctx)

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        return self.decoder.logits(hidden, ctx)


class Llama4Loader:
    """Builds a rank's part of a `Llama4` from tensors by Hugging Face name. ValueError if the model
    cannot be cut into `shard.size` parts."""

    def __init__(
        self,
        arch: Llama4Arch,
        read: ReadStored,
        place: Place,
        max_len: int,
        cache_scales: Mapping[int, CacheScales] | None = None,
    ) -> None:
        check_degree(arch, place.shard.size)
        check_experts(arch, place.experts, place.shard.size)
        self._arch, self._place, self._max_len = arch, place, max_len
        read = _halved_pairs(read, arch.head_dim)
        self._blocks = LayerLoader.of(arch, read, place, max_len, cache_scales)
        ones = torch.ones(arch.head_dim, device=place.device)
        self._norm = QKNorm(ones, arch.rms_norm_eps) if arch.qk_norm else None
        cosines_and_sines = torch.ones(2, arch.head_dim // 2) * torch.tensor([[1.0], [0.0]])
        self._no_turn = cosines_and_sines.view(1, -1).to(place.device)
        self._temperatures = _temperatures(arch.temperature, max_len, place.device)

    def load(self) -> Llama4:
        chunk = self._arch.attention_chunk
        is_cut = chunk is not None and chunk < self._max_len
        return Llama4(load_decoder(self._blocks, self._layer), chunk if is_cut else None)

    def _layer(self, index: int, prefix: str) -> Llama4Layer:
        norms = ("input_layernorm", "post_attention_layernorm")
        before, after = (self._blocks.norm(f"{prefix}.{name}") for name in norms)
        attention = self._attention(index, f"{prefix}.self_attn")
        return Llama4Layer(before, attention, after, self._feed_forward(index, prefix))

    def _attention(self, index: int, prefix: str) -> Llama4Attention:
        plain, arch = self._blocks.attention(index, prefix), self._arch
        rotates = index in arch.rope_layers
        return Llama4Attention(
            layer=index,
            qkv=plain.qkv,
            output=plain.output,
            cos_sin=plain.cos_sin if rotates else self._no_turn,
            norm=self._norm if rotates else None,
            temperatures=None if rotates else self._temperatures,
            is_chunked=index in arch.chunk_layers,
            scale=plain.scale,
            cache_scales=plain.cache_scales,
        )

    def _feed_forward(self, index: int, prefix: str) -> GatedMLP | RoutedMLP:
        arch, prefix = self._arch, f"{prefix}.feed_forward"
        if index not in arch.moe_layers:
            return self._blocks.mlp(prefix, arch.dense_intermediate_size)
        # Rounded logits could send tokens to other experts.
        whole = replace(self._blocks, place=replace(self._place, weights="plain"))
        router = [(f"{prefix}.router", slice(0, arch.num_experts))]
        return RoutedMLP(
            router=whole.pack_rows(router),
            experts=self._experts(prefix.removesuffix("feed_forward") + EXPERTS),
            shared=self._blocks.mlp(f"{prefix}.shared_expert"),
        )

    def _experts(self, prefix: str) -> ExpertWeights:
        count, width = self._arch.num_experts, self._arch.intermediate_size
        shard, own, held = self._place.shard, slice(0, width), range(count)
        if self._place.experts == "expert":
            held = held[shard.even(count)]
        else:
            own = shard.even(width)
        kind = SeparateExperts if self._arch.separate_experts else FusedExperts
        experts = kind(self._blocks.read, prefix, width, own)
        pack = self._place.packer.pack_experts
        try:
            gate_up = pack(map(experts.gate_up, held), len(held))
            down = pack(map(experts.down, held), len(held))
        except ValueError as error:
            raise ValueError(f"tensors of {prefix}: {error}") from error
        return ExpertWeights(gate_up, down, held=None if len(held) == count else held)


@dataclass(frozen=True, slots=True)
class SeparateExperts:
    """Experts whose weights are linear layers. Of each, the part `own` of its width."""

    read: ReadStored
    prefix: str
    width: int
    own: slice

    def gate_up(self, index: int) -> list[Part]:
        return [self.read(self._name(index, part))[self.own] for part in ("gate", "up")]

    def down(self, index: int) -> list[Part]:
        return [self.read(self._name(index, "down"))[ALL, self.own]]

    def _name(self, index: int, part: str) -> str:
        return f"{self.prefix}.{index}.{part}_proj.weight"


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """Experts whose weights are stored as two tensors, [E, in, out]. Of each, the part `own` of its
    width."""

    read: ReadStored
    prefix: str
    width: int
    own: slice

    def gate_up(self, index: int) -> list[Part]:
        up = slice(self.width + self.own.start, self.width + self.own.stop)
        return [self._outputs("gate_up", index, ALL, part) for part in (self.own, up)]

    def down(self, index: int) -> list[Part]:
        return [self._outputs("down", index, self.own, ALL)]

    def _outputs(self, name: str, index: int, inputs: slice, outputs: slice) -> Part:
        stored = self.read(f"{self.prefix}.{name}_proj")
        return dense(stored[slice(index, index + 1), inputs, outputs])[0].T


def _halved_pairs(read: ReadStored, head_dim: int) -> ReadStored:
    """Reads queries and keys in the order of our rotary kernels."""

    def reordered(name: str) -> Stored:
        rotates = ".q_proj." in name or ".k_proj." in name
        return PairedRows(read(name), head_dim) if rotates else read(name)

    return reordered


def _temperatures(
    rule: AttentionTemperature | None, max_len: int, device: torch.device
) -> Tensor | None:
    """[max_len] float32 factors of queries; None if all are 1. A table, so that a position's factor
    has the same bits in every batch."""
    if rule is None or max_len < rule.floor_scale:
        return None
    steps = torch.floor((torch.arange(max_len, device=device).float() + 1.0) / rule.floor_scale)
    return torch.log1p(steps) * rule.scale + 1.0
