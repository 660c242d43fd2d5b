"""Fetches part of the next product's weight into the L2 cache while a small kernel runs.

A step of few rows takes as long as reading all weights. While norms, rotations and attention run,
they hardly use the memory; weights that are fetched then need not be read later. Programs without
other work fetch, before they wait for the kernels before theirs, since no kernel writes weights.

They fetch pieces all over the weight: then every program of the product finds the same share in the
cache, in whatever order it reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

from kernels.ops import LinearWeight
from kernels.triton_overlap import can_overlap, in_kernels

PIECE = 4096  # bytes that one thread fetches
MOST_ROWS = 16  # steps of more rows have less time without memory traffic
PROGRAMS = 128  # about one on every multiprocessor


class Ahead(NamedTuple):
    """What to fetch, as arguments of a kernel."""

    ahead_ptr: Tensor | None  # uint8; None: nothing
    num_pieces: int = 0
    piece_stride: int = 0  # bytes
    per_program: int = 0

    @property
    def programs(self) -> int:
        return 0 if self.ahead_ptr is None else triton.cdiv(self.num_pieces, self.per_program)

    @property
    def words(self) -> str:
        """In the name of a launch."""
        return ", fetching" if self.programs else ""

    def grid(self, num_rows: int) -> tuple[int]:
        """Programs for the rows and for fetching."""
        return (num_rows + self.programs if num_rows else 0,)

    def arguments(self, num_rows: int, num_warps: int) -> dict[str, Any]:
        return {**self._asdict(), "num_rows": num_rows, "LANES": 32 * num_warps}


NOTHING = Ahead(None)


def ahead_of(weight: LinearWeight | None, most: int, num_rows: int) -> Ahead:
    """Up to `most` bytes of a weight, in a step of `num_rows` rows."""
    if weight is None or not 0 < num_rows <= MOST_ROWS or not weight.data.is_contiguous():
        return NOTHING
    size = weight.data.numel() * weight.data.itemsize
    num_pieces = min(most, size) // PIECE
    if not num_pieces or weight.data.storage_offset() * weight.data.itemsize % 16:
        return NOTHING
    stride = size // num_pieces // 16 * 16  # fetches begin at multiples of 16 bytes
    data = weight.data.view(-1).view(torch.uint8)
    return Ahead(data, num_pieces, stride, triton.cdiv(num_pieces, PROGRAMS))


@in_kernels
def fetch(pointers: Any, wanted: Any, _semantic: Any = None) -> None:
    """Fetch PIECE bytes from each of the pointers where `wanted` (int32) is not 0."""
    if can_overlap(_semantic):
        code = (
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; "
            f"@p cp.async.bulk.prefetch.L2.global [$1], {PIECE}; mov.b32 $0, 0; }}"
        )
        core.inline_asm_elementwise(
            code,
            "=r,l,r",
            [pointers, wanted],
            dtype=core.int32,
            is_pure=False,
            pack=1,
            _semantic=_semantic,
        )


@in_kernels
def bring_near(pointers: Any, num_bytes: Any, _semantic: Any = None) -> None:
    """Fetch `num_bytes` (int32) from each of the pointers; both are multiples of 16."""
    if can_overlap(_semantic):
        core.inline_asm_elementwise(
            "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r",
            [pointers, num_bytes],
            dtype=core.int32,
            is_pure=False,
            pack=1,
            _semantic=_semantic,
        )


@triton.jit
def fetch_share(
    ahead_ptr, program, num_pieces, piece_stride, per_program, LANES: tl.constexpr
):  # LANES: as many as the program has threads
    """The share of a program; none if its number is negative."""
    lanes = tl.arange(0, LANES)
    pieces = program * per_program + lanes
    wanted = (program >= 0) & (lanes < per_program) & (pieces < num_pieces)
    fetch(ahead_ptr + pieces.to(tl.int64) * piece_stride, wanted.to(tl.int32))
