"""What the packing kernels share. Each program reads the counts of all rows and adds them up again,
which is quick for a few hundred."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 32  # packed places of one program
MAX_ROWS = 4096


@triton.jit
def of_rows(values, row, rows):
    """The values [ROWS] of rows, at the rows `row` [BLOCK]."""
    return tl.sum(tl.where(rows[None, :] == row[:, None], values[None, :], 0), axis=1)


@triton.jit
def find_places(order, counts, ends, rows, exists, B):
    """The row of each packed place `order` [BLOCK], its place in the row, and whether it is in use.
    `counts` and `ends` [ROWS]: the places of each row, and where its last one ends."""
    ended = exists[None, :] & (ends[None, :] <= order[:, None])  # [BLOCK, ROWS]
    num_ended = tl.sum(ended.to(tl.int32), axis=1)
    row = tl.minimum(num_ended, B - 1)
    return row, order - of_rows(ends - counts, row, rows), num_ended < B


@triton.jit
def store_starts(cu_ptr, cu_q_ptr, counts, ends, rows, exists, B):
    """Where each row begins, in both types that are wanted; by one program."""
    tl.store(cu_ptr + rows, (ends - counts).to(tl.int64), mask=exists)
    tl.store(cu_q_ptr + rows, ends - counts, mask=exists)
    total = tl.sum(counts, axis=0)
    tl.store(cu_ptr + B, total.to(tl.int64))
    tl.store(cu_q_ptr + B, total)
