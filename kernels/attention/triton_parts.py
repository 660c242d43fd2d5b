"""What programs of the attention kernel write: rows of the output, or parts to be averaged."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_rows(out_ptr, own, out, wanted, columns):
    out_ptrs = out_ptr + own[:, None] + columns[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=wanted[:, None])


@triton.jit
def write_part(
    parts_ptr, log_sums_ptr, part, out, peak, total, wanted,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store what a program found about its keys; `out` [BLOCK_M, D] only where it saw some."""
    part_rows = part * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(log_sums_ptr + part_rows, peak + tl.log2(total), mask=wanted)
    out_ptrs = parts_ptr + (part_rows * D)[:, None] + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, out, mask=(wanted & (total > 0))[:, None])


@triton.jit
def merge_parts(
    parts_ptr, log_sums_ptr, first_part, num_parts, wanted,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """The average [BLOCK_M, D] of the parts of a tile, which other programs wrote."""
    rows, places = tl.arange(0, BLOCK_M), tl.arange(0, MAX_SPLITS)
    log_sums = tl.load(
        log_sums_ptr + (first_part + places)[:, None] * BLOCK_M + rows[None, :],
        mask=(places < num_parts)[:, None] & wanted[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )  # [MAX_SPLITS, BLOCK_M]
    peak = tl.where(wanted, tl.max(log_sums, axis=0), 0.0)
    total = tl.where(wanted, tl.sum(tl.exp2(log_sums - peak[None, :]), axis=0), 1.0)
    merged = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    for first in range(0, num_parts, 8):
        for place in tl.static_range(8):  # their loads wait together
            part_rows = (first_part + first + place) * BLOCK_M + rows
            inside = wanted & (part_rows < (first_part + num_parts) * BLOCK_M)
            log_sum = tl.load(
                log_sums_ptr + part_rows, mask=inside, other=float("-inf"), cache_modifier=".cg"
            )
            part = tl.load(
                parts_ptr + (part_rows * D)[:, None] + tl.arange(0, D)[None, :],
                mask=(log_sum > float("-inf"))[:, None],  # an empty part was not written
                other=0.0,
                cache_modifier=".cg",
            )
            merged += part * tl.exp2(log_sum - peak)[:, None]
    return merged / total[:, None]
