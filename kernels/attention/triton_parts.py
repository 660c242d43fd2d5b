"""What programs of the attention kernel write: rows of the output, or parts to be averaged."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention.triton_lookup import find_tile
from kernels.triton_overlap import await_inputs


@triton.jit
def write_rows(out_ptr, own, out, wanted, D: tl.constexpr):
    out_ptrs = out_ptr + own[:, None] + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=wanted[:, None])


@triton.jit
def write_part(
    parts_ptr, log_sums_ptr, part, out, peak, total, wanted, num_steps,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store what a program found about its keys; `out` [BLOCK_M, D] only if it had a step."""
    rows = tl.arange(0, BLOCK_M)
    part_rows = part * BLOCK_M + rows
    tl.store(log_sums_ptr + part_rows, peak + tl.log2(total), mask=wanted)
    out_ptrs = parts_ptr + (part_rows * D)[:, None] + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, out, mask=(wanted & (num_steps + rows > rows))[:, None])


@triton.jit
def merge_parts(
    parts_ptr, log_sums_ptr, first_part, num_parts, wanted,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MERGED_ROWS: tl.constexpr, MERGED_PARTS: tl.constexpr,
):  # fmt: skip
    """The average [MERGED_ROWS, D] of the parts of a tile, none empty, which other programs wrote.
    Sums and values are read together, MERGED_PARTS at a time, and weighted as in attention."""
    rows, columns = tl.arange(0, MERGED_ROWS), tl.arange(0, D)
    merged = tl.zeros([MERGED_ROWS, D], dtype=tl.float32)
    peak = tl.full([MERGED_ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([MERGED_ROWS], dtype=tl.float32)
    numbers = rows[:, None] * D + columns[None, :]
    for first in range(0, num_parts, MERGED_PARTS):
        here = (first_part + first) * BLOCK_M
        for place in tl.static_range(MERGED_PARTS):  # their loads wait together
            inside = wanted & (rows * 0 + first + place < num_parts)
            log_sum = tl.load(
                log_sums_ptr + here + (rows + place * BLOCK_M),
                mask=inside,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            part = tl.load(
                parts_ptr + here * D + (numbers + place * BLOCK_M * D),
                mask=inside[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            new_peak = tl.maximum(peak, log_sum)
            origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weight, fade = tl.exp2(log_sum - origin), tl.exp2(peak - origin)
            total = total * fade + weight
            merged = merged * fade[:, None] + part * weight[:, None]
            peak = new_peak
    return merged / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def write_average(
    out_ptr, parts_ptr, log_sums_ptr, first_part, num_parts, start, count, first_query, kv_head,
    out_stride, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    MERGED_ROWS: tl.constexpr, MERGED_PARTS: tl.constexpr, FEW_PARTS: tl.constexpr = 4,
):  # fmt: skip
    """The rows of a tile, all of which are among the first MERGED_ROWS, from its parts."""
    rows = tl.arange(0, MERGED_ROWS)
    queries = first_query + rows // GROUP
    wanted = (rows < BLOCK_M // GROUP * GROUP) & (queries < count)
    if num_parts <= FEW_PARTS:  # a short context: fewer instructions
        merged = merge_parts(
            parts_ptr, log_sums_ptr, first_part, num_parts, wanted,
            D, BLOCK_M, MERGED_ROWS, FEW_PARTS,
        )  # fmt: skip
    else:
        merged = merge_parts(
            parts_ptr, log_sums_ptr, first_part, num_parts, wanted,
            D, BLOCK_M, MERGED_ROWS, MERGED_PARTS,
        )  # fmt: skip
    own = (start + queries).to(tl.int64) * out_stride + (kv_head * GROUP + rows % GROUP) * D
    write_rows(out_ptr, own, merged, wanted, D)


@triton.jit
def average_if_last(
    counter_ptr, out_ptr, parts_ptr, log_sums_ptr, first_part, num_parts, start, count,
    first_query, kv_head, out_stride, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, MERGED_ROWS: tl.constexpr, MERGED_PARTS: tl.constexpr,
):  # fmt: skip
    """Count this program's part, which it has written; the last one writes the output."""
    tl.debug_barrier()  # all threads have written before one says so
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        write_average(
            out_ptr, parts_ptr, log_sums_ptr, first_part, num_parts,
            start, count, first_query, kv_head, out_stride,
            GROUP, D, BLOCK_M, MERGED_ROWS, MERGED_PARTS,
        )  # fmt: skip
        tl.store(counter_ptr, 0)  # for the next launch


@triton.jit
def merge_splits(
    out_ptr,  # [T, Hq * D]
    parts_ptr,  # [tiles, Hkv, splits, BLOCK_M, D] float32
    log_sums_ptr,  # [tiles, Hkv, splits, BLOCK_M] float32
    cu_q_ptr,  # [B + 1] int32
    num_rows,
    tiles_per_row,
    fewest,
    most,
    num_splits,
    out_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,  # a power of 2, at least num_splits
    SEARCH: tl.constexpr,
):
    """Merge the parts of MERGED_ROWS rows of a tile. Grid (groups of rows, Hkv, tiles)."""
    await_inputs()
    kv_head, tile = tl.program_id(1), tl.program_id(2)
    row, first_query = find_tile(tile, cu_q_ptr, num_rows, tiles_per_row, BLOCK_M // GROUP, SEARCH)
    start = tl.load(cu_q_ptr + row)
    count = tl.load(cu_q_ptr + row + 1) - start
    first_row = tl.program_id(0) * MERGED_ROWS
    if (count < fewest) | (count > most) | (first_query + first_row // GROUP >= count):
        return
    rows = first_row + tl.arange(0, MERGED_ROWS)
    queries = first_query + rows // GROUP
    wanted = (rows < BLOCK_M // GROUP * GROUP) & (queries < count)  # [MERGED_ROWS]
    splits = tl.arange(0, MAX_SPLITS)
    first_part = (tile.to(tl.int64) * tl.num_programs(1) + kv_head) * num_splits
    part_rows = (first_part + splits)[:, None] * BLOCK_M + rows[None, :]
    log_sums = tl.load(
        log_sums_ptr + part_rows,
        mask=(splits < num_splits)[:, None] & wanted[None, :],
        other=float("-inf"),
    )  # [MAX_SPLITS, MERGED_ROWS]
    columns = tl.arange(0, D)
    parts = tl.load(
        parts_ptr + part_rows[:, :, None] * D + columns[None, None, :],
        mask=(log_sums > float("-inf"))[:, :, None],  # an empty part was not written
        other=0.0,
    )
    peak = tl.max(log_sums, axis=0)
    weights = tl.exp2(log_sums - tl.where(wanted, peak, 0.0)[None, :])
    total = tl.where(wanted, tl.sum(weights, axis=0), 1.0)
    out = tl.sum(parts * weights[:, :, None], axis=0) / total[:, None]
    targets = (start + queries).to(tl.int64) * out_stride + (kv_head * GROUP + rows % GROUP) * D
    out_ptrs = out_ptr + targets[:, None] + columns[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=wanted[:, None])
