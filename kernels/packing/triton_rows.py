"""Starts the rows of a step in Triton: one launch instead of ten small ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.packing.rows import LineRows, StartedRows
from kernels.triton_launch import Launch, pointers
from kernels.triton_overlap import await_inputs

_BLOCK = 256  # columns, or changes, at a time


@triton.jit
def _start_rows_kernel(
    lines_ptr,  # as `LineRows` says
    follows_ptr,
    own_tokens_ptr,
    own_starts_ptr,
    lens_ptr,
    limits_ptr,
    num_known_ptr,
    places_ptr,
    blocks_ptr,
    line_tokens_ptr,
    line_positions_ptr,
    line_tables_ptr,
    started_tables_ptr,  # as `StartedRows` says, from here on
    started_tokens_ptr,
    started_starts_ptr,
    started_positions_ptr,
    started_max_nodes_ptr,
    columns,
    U,
    BLOCK: tl.constexpr,
):
    """One row, grid (B,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    line = tl.load(lines_ptr + row)
    token = tl.load(own_tokens_ptr + row)
    start = tl.load(own_starts_ptr + row)
    if tl.load(follows_ptr + row) != 0:
        token = tl.load(line_tokens_ptr + line)
        start = tl.load(line_positions_ptr + line)
    limit = tl.load(limits_ptr + row)
    is_known = tl.load(num_known_ptr + row) > 0
    tl.store(started_tokens_ptr + row, token)
    tl.store(started_starts_ptr + row, start)
    position = tl.maximum(start + tl.load(lens_ptr + row) - 1, 0)
    tl.store(started_positions_ptr + row, position)
    tl.store(started_max_nodes_ptr + row, tl.where(is_known, tl.minimum(limit, 1), limit))

    table = line_tables_ptr + line * columns
    started = started_tables_ptr + row * columns
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < columns
        tl.store(started + at, tl.load(table + at, mask=inside), mask=inside)
    tl.debug_barrier()  # what other threads copied may be changed now
    for first in range(0, U, BLOCK):
        changes = first + tl.arange(0, BLOCK)
        place = tl.load(places_ptr + changes, mask=changes < U, other=-1) - line * columns
        mine = (changes < U) & (place >= 0) & (place < columns)
        block = tl.load(blocks_ptr + changes, mask=mine, other=0)
        tl.store(table + place, block, mask=mine)
        tl.store(started + place, block, mask=mine)


def start_rows(rows: LineRows) -> StartedRows:
    """The roots of all rows; changes the block tables of their lines."""
    B, columns = len(rows.lines), rows.line_tables.shape[1]
    tables = torch.empty(B, columns, dtype=torch.int32, device=rows.lines.device)
    started = StartedRows(tables, *(torch.empty_like(rows.lines) for _ in range(4)))
    launch(rows, started).run()
    return started


def launch(rows: LineRows, started: StartedRows) -> Launch:
    B, columns = started.tables.shape
    arguments = {**pointers("", rows), **pointers("started_", started)}
    assert B > 0
    assert all(part is not None and part.is_contiguous() for part in arguments.values())
    return Launch(
        name=f"start_rows[columns={columns}]",
        kernel=_start_rows_kernel,
        grid=(B,),
        arguments={**arguments, "columns": columns, "U": len(rows.places), "BLOCK": _BLOCK},
    )


def example_launches() -> list[Launch]:
    """64 rows of up to 8192 tokens."""
    B, U, columns = 64, 516, 516
    integers = torch.empty(U, dtype=torch.int64, device="meta")
    tables = torch.empty(B + 1, columns, dtype=torch.int32, device="meta")
    row, flags = integers[:B], integers[:B].bool()
    lines = LineRows(
        row, flags, *(row,) * 5, integers, integers.int(), *(integers[: B + 1],) * 2, tables
    )
    return [launch(lines, StartedRows(tables[:B], *(row,) * 4))]
