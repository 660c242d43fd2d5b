"""Builds the blocks of a decoder layer from named tensors: reads a rank's slices, fuses and packs
them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.stored import ReadStored
from engine.models.layers import (
    Attention,
    ColumnParallelLinear,
    DecoderLayer,
    GatedMLP,
    RMSNorm,
    RowParallelLinear,
)
from engine.models.place import Place
from engine.models.rope import cos_sin_table
from engine.models.weights import with_zero_rows
from kernels.linear.quantised import Part, dense
from kernels.ops import UNSCALED, CacheScales, LinearWeight, PackedLayer

ReadTensor = Callable[[str], Tensor]
ALL = slice(None)


@dataclass(frozen=True, slots=True)
class LayerLoader:
    """Reads a rank's part of blocks by Hugging Face name. Widths that are cut come from `arch`,
    which must have passed `check_degree` for `place.shard.size` ranks; all others come from the
    tensors, which the caller has checked."""

    arch: LlamaArch
    read: ReadStored
    place: Place
    cos_sin: Tensor  # [max_len, D] float32
    cache_scales: Mapping[int, CacheScales]  # of layers, if the cache is in FP8

    @classmethod
    def of(
        cls,
        arch: LlamaArch,
        read: ReadStored,
        place: Place,
        max_len: int,
        cache_scales: Mapping[int, CacheScales] | None = None,
    ) -> LayerLoader:
        """A loader of blocks for up to `max_len` positions."""
        table = cos_sin_table(arch.head_dim, max_len, arch.rope_theta, arch.rope_scaling)
        return cls(arch, read, place, table.to(place.device), cache_scales or {})

    def decoder_layer(
        self, layer: int, prefix: str, *, with_input_norm: bool = True
    ) -> DecoderLayer:
        """`layer` is its index in the KV cache."""
        norm = self.norm(f"{prefix}.input_layernorm") if with_input_norm else None
        parts = DecoderLayer(
            input_norm=norm,
            attention=self.attention(layer, f"{prefix}.self_attn"),
            post_attention_norm=self.norm(f"{prefix}.post_attention_layernorm"),
            mlp=self.mlp(f"{prefix}.mlp"),
        )
        return replace(parts, whole=self._whole(parts))

    def _whole(self, parts: DecoderLayer) -> PackedLayer | None:
        """The layer as one call, if there is such an operation. Ranks that sum partial outputs
        cannot use it."""
        pack_layer = self.place.ops.pack_layer
        if pack_layer is None or self.place.shard.size > 1:
            return None
        return pack_layer(parts.weights)

    def attention(self, layer: int, prefix: str) -> Attention:
        """`layer` is its index in the KV cache; `prefix` ends in `self_attn`."""
        queries, keys = self._attention_rows()
        taken = {"q": queries, "k": keys, "v": keys}
        parts = [(f"{prefix}.{part}_proj", rows) for part, rows in taken.items()]
        return Attention(
            layer=layer,
            qkv=ColumnParallelLinear(self.pack_rows(parts, bias=self.arch.attention_bias)),
            output=self._attention_output(prefix, queries),
            cos_sin=self.cos_sin,
            scale=self.arch.head_dim**-0.5,
            cache=self.place.cache_dtype,
            cache_scales=self.cache_scales.get(layer, UNSCALED),
        )

    def split_attention(
        self, prefix: str
    ) -> tuple[ColumnParallelLinear, ColumnParallelLinear, RowParallelLinear]:
        """The weights of attention, where keys and values are also made without queries: of
        queries, of keys and values together, and of the output."""
        bias, (queries, keys) = self.arch.attention_bias, self._attention_rows()
        both = [(f"{prefix}.{part}_proj", keys) for part in "kv"]
        return (
            ColumnParallelLinear(self.pack_rows([(f"{prefix}.q_proj", queries)], bias=bias)),
            ColumnParallelLinear(self.pack_rows(both, bias=bias)),
            self._attention_output(prefix, queries),
        )

    def _attention_rows(self) -> tuple[slice, slice]:
        """This rank's rows of queries, and of keys and values."""
        shard, head_dim = self.place.shard, self.arch.head_dim
        queries = _scaled(shard.even(self.arch.num_heads), head_dim)
        return queries, _scaled(shard.kv_heads(self.arch.num_kv_heads), head_dim)

    def _attention_output(self, prefix: str, queries: slice) -> RowParallelLinear:
        bias = self.arch.attention_bias
        return RowParallelLinear(self.pack_columns(f"{prefix}.o_proj", queries, bias=bias))

    def mlp(self, prefix: str, size: int | None = None) -> GatedMLP:
        """`size`: its width, if not `arch.intermediate_size`."""
        bias, inner = self.arch.mlp_bias, self.place.shard.even(size or self.arch.intermediate_size)
        parts = [(f"{prefix}.gate_proj", inner), (f"{prefix}.up_proj", inner)]
        form = self.place.mlp_weights or self.place.weights
        own = replace(self, place=replace(self.place, weights=form))
        return GatedMLP(
            gate_up=ColumnParallelLinear(own.pack_rows(parts, bias=bias)),
            down=RowParallelLinear(own.pack_columns(f"{prefix}.down_proj", inner, bias=bias)),
        )

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._vector(f"{name}.weight", ALL), self.arch.rms_norm_eps)

    def pack_rows(self, parts: Sequence[tuple[str, slice]], *, bias: bool = False) -> LinearWeight:
        """Stack the given rows (outputs) of each named layer into one packed weight."""
        num_rows = sum(rows.stop - rows.start for _, rows in parts)
        weights = (self.read(f"{name}.weight")[rows] for name, rows in parts)
        offset = None
        if bias:
            offset = torch.cat([self._vector(f"{name}.bias", rows) for name, rows in parts])
        return self.place.packer.pack(weights, num_rows, offset)

    def pack_columns(self, name: str, columns: slice, *, bias: bool = False) -> LinearWeight:
        """The given columns (inputs) of a layer. Partial outputs are summed over ranks, so only
        rank 0 adds the bias."""
        weight = self.read(f"{name}.weight")[ALL, columns]
        own = bias and self.place.shard.rank == 0
        offset = self._vector(f"{name}.bias", ALL) if own else None
        return self.place.packer.pack([weight], len(weight), offset)

    def pack_padded(self, name: str, num_rows: int, *, bias: bool = False) -> LinearWeight:
        """This rank's part of `num_rows` outputs, zeros after the end (see `Shard.padded`)."""
        width = self.place.shard.padded_width(num_rows)
        offset = None
        if bias:
            offset = dense(self._padded(f"{name}.bias", num_rows)).to(self.place.device)
        return self.place.packer.pack([self._padded(f"{name}.weight", num_rows)], width, offset)

    def padded(self, name: str, num_rows: int) -> Tensor:
        """This rank's part of the rows of a weight as plain numbers, not packed."""
        return dense(self._padded(name, num_rows)).to(self.place.device, self.place.dtype)

    def _padded(self, name: str, num_rows: int) -> Part:
        width, rows = self.place.shard.padded_width(num_rows), self.place.shard.padded(num_rows)
        return with_zero_rows(self.read(name)[rows], width)

    def _vector(self, name: str, items: slice) -> Tensor:
        return dense(self.read(name)[items]).to(self.place.device, torch.float32)


def _scaled(items: slice, width: int) -> slice:
    """The rows of `items`, with `width` rows per item."""
    return slice(items.start * width, items.stop * width)
