"""Four-bit weights of safetensors files, read in part: compressed-tensors, AWQ, GPTQ.

All three hold eight codes in an int32. They differ in the axis along which codes are packed, in
their order within a word, and in what a stored zero point means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.arch import Shape
from engine.checkpoints.quantised.config import GROUPS, Scheme
from engine.checkpoints.stored import (
    FLOATS,
    Bounds,
    Index,
    View,
    bounds,
    require_dtype,
    require_matrix,
)
from kernels.linear.grouped import GroupedWeight
from kernels.linear.quantised import Part

PER_WORD = 8  # codes in an int32
MIDDLE = 8  # the code of zero where there are no zero points
WIDE_GROUP = 128  # inputs per scale where a scale is for all inputs, if they divide so
# AWQ: place of column c of eight among the codes of a word
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
ORDER = ("weight_g_idx", "g_idx")
INTEGERS = ("I32", "I64")
DTYPES = {  # of tensors that are not words of codes
    "weight_scale": FLOATS,
    "scales": FLOATS,
    "weight_shape": INTEGERS,
    "weight_g_idx": INTEGERS,
    "g_idx": INTEGERS,
}
WORDS = ("I32",)
Views = Mapping[str, View]  # by the end of their names, such as `qweight`


@dataclass(frozen=True, slots=True)
class StoredGroups:
    """A weight [N, K] in codes of four bits (implements `Stored`)."""

    shape: Shape
    views: Views
    scheme: Scheme

    def __getitem__(self, index: Index, /) -> Part:
        """Plain numbers where the groups cannot stay: their inputs are not neighbours, or columns
        are cut within one."""
        rows, columns = bounds(index, self.shape)
        order = self._order()
        if order is not None:
            return self._in_order(rows, order)[:, slice(*columns)]
        # Whole words, and whole groups.
        top, bottom = _aligned(rows, PER_WORD, self.shape[0])
        left, right = _aligned(columns, self._group, self.shape[1])
        part = self._read((top, bottom), (left, right))
        own = part[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        fits = isinstance(own, GroupedWeight) and self._group % GROUPS == 0
        return own if fits or isinstance(own, Tensor) else own.dequantised()

    @property
    def _group(self) -> int:
        """Inputs per scale, as we keep it."""
        if self.scheme.group is not None:
            return self.scheme.group
        width = self.shape[1]
        return next((each for each in (WIDE_GROUP, GROUPS) if width % each == 0), width)

    def _order(self) -> Tensor | None:
        """The group of each input, [K], if the groups are not runs of neighbours."""
        view = next((self.views[name] for name in ORDER if name in self.views), None)
        if view is None:
            return None
        order = torch.as_tensor(view[:]).long()
        size = self.scheme.group or self.shape[1]
        return None if torch.equal(order, torch.arange(len(order)) // size) else order

    def _in_order(self, rows: Bounds, order: Tensor) -> Tensor:
        top, bottom = _aligned(rows, PER_WORD, self.shape[0])
        codes, scales, zeros = self._parts((top, bottom), (0, self.shape[1]))
        values = (codes.float() - zeros.float()[:, order]) * scales.float()[:, order]
        return values[rows[0] - top : rows[1] - top]

    def _read(self, rows: Bounds, columns: Bounds) -> GroupedWeight:
        codes, scales, zeros = self._parts(rows, columns)
        if self.scheme.group is None:
            copies = codes.shape[1] // self._group
            scales, zeros = (each.repeat_interleave(copies, dim=1) for each in (scales, zeros))
        if bool((zeros == MIDDLE).all()):
            return GroupedWeight(codes, _halves(scales).contiguous(), None, 4)
        wide = scales.float().contiguous()
        return GroupedWeight(codes, wide, -wide * zeros.float(), 4)

    def _parts(self, rows: Bounds, columns: Bounds) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [n, k], scales [n, g] and zero points [n, g]."""
        size = self.scheme.group
        groups = (0, 1) if size is None else (columns[0] // size, -(-columns[1] // size))
        return READERS[self.scheme.layout](self.views, rows, columns, groups, self.scheme)

    def check(self, name: str) -> None:
        """ValueError for tensors that do not fit together."""
        if "weight_shape" in self.views and (len(self.shape) != 2 or min(self.shape) < 1):
            raise ValueError(
                f"tensor {name}.weight_shape is {list(self.shape)}; it needs two positive numbers"
            )
        (N, K), groups = self.shape, -(-self.shape[1] // (self.scheme.group or self.shape[1]))
        if K % (self.scheme.group or 1):
            raise ValueError(f"{name}: {K} inputs are not divided by groups of {self.scheme.group}")
        for part, shapes in SHAPES[self.scheme.layout](N, K, groups).items():
            found = tuple(self.views[part].get_shape()) if part in self.views else None
            if found is not None and found not in shapes:
                raise ValueError(
                    f"tensor {name}.{part} has shape {list(found)}; for a weight {[N, K]} with "
                    f"{groups} groups it is {' or '.join(str(list(each)) for each in shapes)}"
                )
        for part in ORDER:
            if part in self.views:
                _check_order(torch.as_tensor(self.views[part][:]), groups, f"{name}.{part}")


def _check_order(order: Tensor, groups: int, name: str) -> None:
    """Indexing would take a negative group for one from the end."""
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        raise ValueError(f"tensor {name} names groups {low} to {high}; there are 0 to {groups - 1}")


def _halves(scales: Tensor) -> Tensor:
    """As float16 where that changes none, else as float32."""
    wide, halves = scales.float(), scales.half()
    return halves if torch.equal(halves.float(), wide) else wide


def check_parts(views: Views, name: str) -> None:
    """ValueError for tensors of another type, or words of codes without two axes."""
    for part, view in views.items():
        require_dtype(view, f"{name}.{part}", DTYPES.get(part, WORDS))
    for part in ("weight_packed", "qweight"):
        if part in views:
            require_matrix(views[part], f"{name}.{part}")


def packed_shape(views: Views) -> Shape:
    """[N, K] of a weight of compressed-tensors, as its file has it."""
    return tuple(int(size) for size in torch.as_tensor(views["weight_shape"][:]))


def awq_shape(views: Views) -> Shape:
    inputs, words = views["qweight"].get_shape()
    return words * PER_WORD, inputs


def gptq_shape(views: Views) -> Shape:
    words, outputs = views["qweight"].get_shape()
    return outputs, words * PER_WORD


def _read_packed(
    views: Views, rows: Bounds, columns: Bounds, groups: Bounds, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    words = views["weight_packed"][slice(*rows), slice(*_words(columns))]
    codes = nibbles(words)[:, : columns[1] - columns[0]]
    scales = torch.as_tensor(views["weight_scale"][slice(*rows), slice(*groups)])
    if scheme.symmetric:
        return codes, scales, torch.full(scales.shape, MIDDLE, dtype=torch.uint8)
    packed = torch.as_tensor(views["weight_zero_point"][slice(*_words(rows)), slice(*groups)])
    return codes, scales, nibbles(packed.T).T[: rows[1] - rows[0]]


def _read_awq(
    views: Views, rows: Bounds, columns: Bounds, groups: Bounds, _: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    def unpacked(name: str, first: Bounds) -> Tensor:
        words = torch.as_tensor(views[name][slice(*first), slice(*_words(rows))])
        places = nibbles(words).reshape(len(words), -1, PER_WORD)
        return places[..., AWQ_PLACES].reshape(len(words), -1).T.contiguous()

    scales = torch.as_tensor(views["scales"][slice(*groups), slice(*rows)]).T
    return unpacked("qweight", columns), scales, unpacked("qzeros", groups)


def _read_gptq(
    views: Views, rows: Bounds, columns: Bounds, groups: Bounds, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    words = torch.as_tensor(views["qweight"][slice(*_words(columns)), slice(*rows)])
    packed = torch.as_tensor(views["qzeros"][slice(*groups), slice(*_words(rows))])
    # Files of the first version hold one less, in four bits.
    zeros = nibbles(packed) + scheme.zero_offset & 15
    scales = torch.as_tensor(views["scales"][slice(*groups), slice(*rows)]).T
    return nibbles(words.T), scales, zeros.T


def nibbles(words: Tensor) -> Tensor:
    """The codes of each row of int32 words, the lowest bits first: [n, w] -> [n, 8 w] uint8."""
    halves = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack((halves & 15, halves >> 4), dim=-1).reshape(len(words), -1)


def _words(items: Bounds) -> Bounds:
    return items[0] // PER_WORD, -(-items[1] // PER_WORD)


def _aligned(items: Bounds, size: int, end: int) -> Bounds:
    return items[0] // size * size, min(-(-items[1] // size) * size, end)


def _packed_shapes(N: int, K: int, groups: int) -> dict[str, tuple[Shape, ...]]:
    rows = -(-N // PER_WORD)
    return {
        "weight_packed": ((N, -(-K // PER_WORD)),),
        "weight_scale": ((N, groups),),
        "weight_zero_point": ((rows, groups),),
        "weight_g_idx": ((K,),),
    }


def _gptq_shapes(N: int, K: int, groups: int) -> dict[str, tuple[Shape, ...]]:
    zeros, scales = ((groups, N // PER_WORD),), ((groups, N),)
    return {"qzeros": zeros, "scales": scales, "g_idx": ((K,),)}


Reader = Callable[[Views, Bounds, Bounds, Bounds, Scheme], tuple[Tensor, Tensor, Tensor]]
READERS: dict[str, Reader] = {"packed": _read_packed, "awq": _read_awq, "gptq": _read_gptq}
SHAPES = {"packed": _packed_shapes, "awq": _gptq_shapes, "gptq": _gptq_shapes}
