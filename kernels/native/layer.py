"""Whole decoder layers as one C function; see kernels/layer/native_kernel.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.linear.scaled import FP8
from kernels.native.library import NativeLibrary, pointer
from kernels.ops import AttentionMeta, CacheScales, LayerWeights, LinearWeight

P, I, R = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float  # noqa: E741

Addresses = ctypes.Array[ctypes.c_void_p]
Pages = tuple[Tensor, ...]  # of one layer each

SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
# Of functions that multiply bfloat16 numbers by special instructions
ENDINGS = {None: "", "amx": "_amx", "avx512_bf16": "_dots"}
MAX_HEAD_DIM = 256
MAX_GROUP = 32  # query heads per KV head


def cache_functions(suffix: str, products: str) -> dict[torch.dtype, tuple[str, str]]:
    """The functions that write and that read a cache, by its dtype. `suffix` and `products` end the
    names of those for caches of the storage dtype."""
    storage = next(dtype for dtype, name in SUFFIXES.items() if name == suffix)
    return {
        storage: (f"aerie_rope_kv_write_{suffix}", f"aerie_attention_{products}"),
        FP8: ("aerie_rope_kv_write_fp8", "aerie_attention_fp8"),
    }


def inverses(scales: CacheScales) -> tuple[float, float]:
    """What keys and values are multiplied with before they are kept."""
    return 1.0 / scales.key, 1.0 / scales.value


class _Linear(ctypes.Structure):
    pass


_Linear._fields_ = [
    ("data", P),
    ("bias", P),
    *((name, I) for name in ("outputs", "bits", "group", "wide", "minimums")),
    ("more", ctypes.POINTER(_Linear)),
]


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, P) for name in ("linear", "linear_groups", "rope_kv_write", "attention")),
        *((name, P) for name in ("input_norm", "post_norm")),
        *((name, _Linear) for name in ("qkv", "output", "gate_up", "down")),
        ("cos_sin", P),
        *((name, I) for name in ("input_size", "hidden_size", "inner_size")),
        *((name, I) for name in ("num_heads", "num_kv_heads", "head_dim")),
        *((name, R) for name in ("eps", "scale", "key_inverse", "value_inverse", "value_scale")),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, I) for name in ("num_tokens", "num_rows", "max_blocks", "block_size")),
        *((name, P) for name in ("positions", "slots", "ancestors")),
        *((name, P) for name in ("cu_q", "prefix_lens", "first_keys", "block_tables")),
    )


class _BatchInputs:
    """Where the tokens of a batch are, as a C structure. All layers of a forward share one."""

    def __init__(self, positions: Tensor, slots: Tensor, meta: AttentionMeta) -> None:
        self._positions, self._slots, self._meta = positions, slots, meta
        tables = meta.block_tables.contiguous()
        held = (positions.contiguous(), slots.contiguous(), meta.ancestors.contiguous())
        self._held = (*held, tables)  # the structure points to these
        self._batch = _Batch(
            len(positions),
            len(meta.prefix_lens),
            tables.shape[1],
            0,
            *(tensor.data_ptr() for tensor in held),
            meta.cu_q.data_ptr(),
            meta.prefix_lens.data_ptr(),
            meta.first_keys.data_ptr(),
            tables.data_ptr(),
        )

    def is_of(self, positions: Tensor, slots: Tensor, meta: AttentionMeta) -> bool:
        """Whether it was made from these very objects."""
        return self._meta is meta and self._positions is positions and self._slots is slots

    def address(self, block_size: int) -> int:
        self._batch.block_size = block_size
        return ctypes.addressof(self._batch)


class LatestBatch:
    """The inputs of the last batch, so that they are made once for all layers."""

    def __init__(self) -> None:
        self._latest: _BatchInputs | None = None

    def of(self, positions: Tensor, slots: Tensor, meta: AttentionMeta) -> _BatchInputs:
        if self._latest is None or not self._latest.is_of(positions, slots, meta):
            self._latest = _BatchInputs(positions, slots, meta)
        return self._latest


class LatestPages:
    """Where the pages of caches are, so that it is found out once: every step of an engine passes
    the same tuples. By number of layers, because a draft head has its own."""

    def __init__(self) -> None:
        self._latest: dict[int, tuple[Pages, Pages, Addresses, Addresses]] = {}

    def of(self, keys: Pages, values: Pages) -> tuple[Addresses, Addresses]:
        found = self._latest.get(len(keys))
        if found is None or found[0] is not keys or found[1] is not values:
            every = (*keys, *values)
            assert all(page.is_contiguous() and page.dtype == every[0].dtype for page in every)
            own = [addresses([page.data_ptr() for page in pages]) for pages in (keys, values)]
            found = self._latest[len(keys)] = (keys, values, own[0], own[1])
        return found[2:]


class NativeLayer:
    """One layer's weights, ready to be run (implements `PackedLayer`)."""

    def __init__(
        self,
        library: NativeLibrary,
        weights: LayerWeights,
        products: str,
        group_products: str,
        of_cache: tuple[str, str],
    ) -> None:
        """`products` ends the names of functions that multiply; `group_products` names the one for
        quantised weights; `of_cache`: see `cache_functions`. Its cache always has the type and the
        scales of `weights`."""
        write, attend = of_cache
        scales = weights.cache_scales
        self._library, self._weights = library, weights  # keep what the structure points to
        linears = {
            name: _linear(getattr(weights, name)) for name in ("qkv", "output", "gate_up", "down")
        }
        self._linears = linears  # keeps the parts that follow a weight
        self._layer = _Layer(
            linear=library.address(f"aerie_linear_{products}"),
            linear_groups=library.address(group_products),
            rope_kv_write=library.address(write),
            attention=library.address(attend),
            input_norm=pointer(weights.input_norm),
            post_norm=weights.post_norm.data_ptr(),
            **linears,
            cos_sin=weights.cos_sin.data_ptr(),
            input_size=weights.qkv.in_features,
            hidden_size=weights.output.all_features,
            inner_size=weights.down.in_features,
            head_dim=weights.cos_sin.shape[1],
            eps=weights.eps,
            scale=weights.scale * scales.key,
            value_scale=scales.value,
        )
        self._layer.key_inverse, self._layer.value_inverse = inverses(scales)
        self._layer.num_heads = weights.output.in_features // self._layer.head_dim
        rows = weights.qkv.all_features // self._layer.head_dim
        self._layer.num_kv_heads = (rows - self._layer.num_heads) // 2
        check_heads(self._layer.num_heads, self._layer.num_kv_heads, self._layer.head_dim)
        self.address = ctypes.addressof(self._layer)


def addresses(values: Sequence[int | None]) -> Addresses:
    """A C array of pointers."""
    return (ctypes.c_void_p * len(values))(*values)


def _linear(weight: LinearWeight) -> _Linear:
    """The structure of a weight and of those that follow it."""
    more = None
    for part in reversed((weight, *weight.more)):
        layout: tuple[Any, ...] = part.layout or (0, 0, False, False)
        node = _Linear(
            part.data.data_ptr(), pointer(part.bias), part.out_features, *map(int, layout)
        )
        if more is not None:
            node.more = ctypes.pointer(more)
        more = node
    assert more is not None
    return more


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """ValueError if native attention cannot take heads of these numbers and size."""
    if head_dim > MAX_HEAD_DIM or num_heads > num_kv_heads * MAX_GROUP:
        raise ValueError(
            f"native attention takes heads of at most {MAX_HEAD_DIM} and {MAX_GROUP} query heads "
            f"per KV head, not {head_dim} and {num_heads // num_kv_heads}; choose "
            "kernels.backend=reference"
        )
