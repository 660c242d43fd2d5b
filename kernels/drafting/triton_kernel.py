"""The steps between the forwards of a draft head in Triton: a launch each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.drafting import triton_entry, triton_growth
from kernels.drafting.nodes import (
    LaidNodes,
    LevelNodes,
    ReadyRoots,
    RootStates,
    RowPlaces,
    evenly,
)
from kernels.drafting.triton_growth import grow_level as grow_level
from kernels.triton_launch import WIDEST_LOAD, Launch, pointers
from kernels.triton_overlap import await_inputs

_BLOCK = 128  # nodes of one program
_KNOWN_SIZES = (576, 4096, 8192)  # SmolLM2, Llama 8B, 70B


@triton.jit
def _first_key(firsts_ptr, line, prefix_len, window):
    """As `reference.first_keys`, for one row; int64."""
    first = tl.load(firsts_ptr + line).to(tl.int64)
    if window is not None:
        first = tl.maximum(first, prefix_len - window)
    return tl.minimum(first, prefix_len)


@triton.jit
def _ready_roots_kernel(
    lines_ptr,  # as `RootStates` says
    positions_ptr,
    max_nodes_ptr,
    states_ptr,
    state_positions_ptr,
    firsts_ptr,
    out_states_ptr,  # as `ReadyRoots` says, from here on
    out_ready_ptr,
    out_faults_ptr,
    out_num_slots_ptr,
    out_first_keys_ptr,
    out_sizes_ptr,
    num_drafted,
    window,  # or None
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least H
):
    """One row, grid (B,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    line = tl.load(lines_ptr + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    state = tl.load(states_ptr + line * H + columns, mask=inside, other=0.0)
    tl.store(out_states_ptr + row * H + columns, state, mask=inside)
    is_finite = tl.abs(state.to(tl.float32)) < float("inf")  # false for NaN, too
    sound = tl.min(is_finite.to(tl.int32), axis=0) > 0
    position = tl.load(positions_ptr + row)
    max_nodes = tl.load(max_nodes_ptr + row)
    wanted = (max_nodes > 1) & (tl.load(state_positions_ptr + line) == position)
    ready = wanted & sound
    tl.store(out_ready_ptr + row, ready)
    tl.store(out_faults_ptr + row, wanted & (sound == 0))
    room = tl.where(max_nodes > 1, tl.maximum(max_nodes, num_drafted), max_nodes)
    tl.store(out_num_slots_ptr + row, room)
    first = _first_key(firsts_ptr, line, position, window)
    tl.store(out_first_keys_ptr + row, first.to(tl.int32))
    tl.store(out_sizes_ptr + row, tl.where(ready, max_nodes, tl.minimum(max_nodes, 1)))


@triton.jit
def _first_keys_kernel(
    firsts_ptr, lines_ptr, prefix_lens_ptr, out_ptr, window, B, ROWS: tl.constexpr
):
    """All rows, grid (1,)."""
    await_inputs()
    rows = tl.arange(0, ROWS)
    exists = rows < B
    lines = tl.load(lines_ptr + rows, mask=exists, other=0)
    prefix_lens = tl.load(prefix_lens_ptr + rows, mask=exists, other=0).to(tl.int64)
    first = _first_key(firsts_ptr, lines, prefix_lens, window)
    tl.store(out_ptr + rows, first.to(tl.int32), mask=exists)


@triton.jit
def _keep_states_kernel(
    kept_states_ptr,  # [L, H] contiguous
    kept_positions_ptr,  # [L] int64
    lines_ptr,  # [B] int64
    states_ptr,  # [C, H] contiguous
    last_ptr,  # [B] int64
    newest_ptr,  # [B] int64
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least H
):
    """One row, grid (B,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    line, last = tl.load(lines_ptr + row), tl.load(last_ptr + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    state = tl.load(states_ptr + last * H + columns, mask=inside)
    tl.store(kept_states_ptr + line * H + columns, state, mask=inside)
    tl.store(kept_positions_ptr + line, tl.load(newest_ptr + row))


@triton.jit
def _lay_levels_kernel(
    nodes_ptr,  # as `LevelNodes` says
    depths_ptr,
    masks_ptr,
    firsts_ptr,
    widths_ptr,
    rows_positions_ptr,  # as `RowPlaces` says
    rows_num_slots_ptr,
    rows_tables_ptr,
    laid_prefix_lens_ptr,  # as `LaidNodes` says
    laid_positions_ptr,
    laid_slots_ptr,
    laid_masks_ptr,
    tables_stride,
    columns,
    first_scratch,
    max_len,
    room,  # rows for which a level has room
    M,
    num_nodes,  # B * M
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Nodes p * BLOCK .. of all rows, grid (programs,)."""
    await_inputs()
    order = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = order < num_nodes
    row, at = order // M, order % M
    node = tl.load(nodes_ptr + at)
    first = tl.load(firsts_ptr + at)
    root = tl.load(rows_positions_ptr + row, mask=inside, other=0)
    alive = node < tl.load(rows_num_slots_ptr + row, mask=inside, other=0)
    cached = root + node
    column = tl.minimum(cached // BLOCK_SIZE, columns - 1)
    table = rows_tables_ptr + row.to(tl.int64) * tables_stride
    block = tl.load(table + column, mask=inside, other=0).to(tl.int64)
    slot = block * BLOCK_SIZE + cached % BLOCK_SIZE
    slot = tl.where(alive, slot, first_scratch + node % BLOCK_SIZE)
    place = first * room + row * tl.load(widths_ptr + at) + (at - first)
    position = tl.minimum(root + tl.load(depths_ptr + at), max_len - 1)
    tl.store(laid_positions_ptr + place, position, mask=inside)
    tl.store(laid_slots_ptr + place, slot, mask=inside)
    tl.store(laid_masks_ptr + place, tl.where(alive, tl.load(masks_ptr + at), 1), mask=inside)
    tl.store(laid_prefix_lens_ptr + row, root.to(tl.int32), mask=inside & (at == 0))


def ready_roots(roots: RootStates) -> ReadyRoots:
    """As the reference."""
    (B,), H = roots.lines.shape, roots.states.shape[1]

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=roots.lines.device)

    ready = ReadyRoots(
        states=new(B, H, dtype=roots.states.dtype),
        ready=new(B, dtype=torch.bool),
        faults=new(B, dtype=torch.bool),
        num_slots=new(B),
        first_keys=new(B, dtype=torch.int32),
        sizes=new(B),
    )
    _ready_launch(roots, ready).run()
    return ready


def first_keys(firsts: Tensor, lines: Tensor, prefix_lens: Tensor, window: int | None) -> Tensor:
    """As the reference."""
    out = torch.empty(len(lines), dtype=torch.int32, device=lines.device)
    _first_keys_launch(firsts, lines, prefix_lens, window, out).run()
    return out


def keep_states(
    kept_states: Tensor,
    kept_positions: Tensor,
    lines: Tensor,
    states: Tensor,
    last: Tensor,
    newest: Tensor,
) -> None:
    """As the reference."""
    _keep_launch(kept_states, kept_positions, lines, states, last, newest).run()


def lay_levels(nodes: LevelNodes, rows: RowPlaces) -> LaidNodes:
    """As the reference."""
    (M,), (B,) = nodes.nodes.shape, rows.positions.shape

    def new(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(count, dtype=dtype, device=rows.positions.device)

    laid = LaidNodes(new(B, torch.int32), *(new(M * evenly(B)) for _ in range(3)))
    _lay_launch(nodes, rows, laid).run()
    return laid


def _ready_launch(roots: RootStates, ready: ReadyRoots) -> Launch:
    H = roots.states.shape[1]
    given = {name: part for name, part in pointers("", roots).items() if part is not None}
    assert all(part.is_contiguous() for part in given.values())
    block = triton.next_power_of_2(H)
    windowed = "" if roots.window is None else ", window"
    return Launch(
        name=f"ready_roots[H={H}{windowed}]",
        kernel=_ready_roots_kernel,
        grid=(len(roots.lines),),
        arguments={
            **given,
            **pointers("out_", ready),
            "num_drafted": roots.num_drafted,
            "window": roots.window,
            "H": H,
            "BLOCK": block,
        },
        num_warps=min(max(block // 512, 1), 32),
        min_load_bits=WIDEST_LOAD,
    )


def _first_keys_launch(
    firsts: Tensor, lines: Tensor, prefix_lens: Tensor, window: int | None, out: Tensor
) -> Launch:
    assert all(part.is_contiguous() for part in (firsts, lines, prefix_lens))
    return Launch(
        name=f"first_keys[{'all' if window is None else 'window'}]",
        kernel=_first_keys_kernel,
        grid=(1,),
        arguments={
            "firsts_ptr": firsts,
            "lines_ptr": lines,
            "prefix_lens_ptr": prefix_lens,
            "out_ptr": out,
            "window": window,
            "B": len(lines),
            "ROWS": triton.next_power_of_2(len(lines)),
        },
        num_warps=1,
    )


def _keep_launch(
    kept_states: Tensor,
    kept_positions: Tensor,
    lines: Tensor,
    states: Tensor,
    last: Tensor,
    newest: Tensor,
) -> Launch:
    H = states.shape[1]
    assert kept_states.dtype == states.dtype
    assert all(part.is_contiguous() for part in (kept_states, states, lines, last, newest))
    block = triton.next_power_of_2(H)
    return Launch(
        name=f"keep_states[H={H}]",
        kernel=_keep_states_kernel,
        grid=(len(lines),),
        arguments={
            "kept_states_ptr": kept_states,
            "kept_positions_ptr": kept_positions,
            "lines_ptr": lines,
            "states_ptr": states,
            "last_ptr": last,
            "newest_ptr": newest,
            "H": H,
            "BLOCK": block,
        },
        num_warps=min(max(block // 512, 1), 32),
        min_load_bits=WIDEST_LOAD,
    )


def _lay_launch(nodes: LevelNodes, rows: RowPlaces, laid: LaidNodes) -> Launch:
    (M,), (B,) = nodes.nodes.shape, rows.positions.shape
    assert M > 0
    assert rows.tables.stride(1) == 1
    assert rows.positions.is_contiguous()
    assert rows.num_slots.is_contiguous()
    return Launch(
        name="lay_levels",
        kernel=_lay_levels_kernel,
        grid=(triton.cdiv(B * M, _BLOCK),),
        arguments={
            **pointers("", nodes),
            **pointers("rows_", rows),
            **pointers("laid_", laid),
            "tables_stride": rows.tables.stride(0),
            "columns": rows.tables.shape[1],
            "first_scratch": rows.first_scratch,
            "max_len": rows.max_len,
            "room": evenly(B),
            "M": M,
            "num_nodes": B * M,
            "BLOCK_SIZE": rows.block_size,
            "BLOCK": _BLOCK,
        },
        num_warps=1,
    )


def launches() -> list[Launch]:
    """Roots of the models we know, and the levels of a dynamic tree of EAGLE-2's size."""
    B, M, L = 64, 24, 65

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    row, small, flags = new(B), new(B, dtype=torch.int32), new(B, dtype=torch.bool)
    firsts = new(L, dtype=torch.int32)
    found = []
    for H, window in [*((H, None) for H in _KNOWN_SIZES), (4096, 512)]:
        kept: Any = (new(L, H, dtype=torch.bfloat16), new(L), firsts)
        roots = RootStates(row, row, row, *kept, M + 1, window)
        states = new(B, H, dtype=torch.bfloat16)
        found.append(_ready_launch(roots, ReadyRoots(states, flags, flags, row, small, row)))
        if window is None:
            found.append(_keep_launch(kept[0], kept[1], row, states, row, row))
    found += [_first_keys_launch(firsts, row, small, window, small) for window in (None, 512)]
    rows = RowPlaces(row, row, new(B, 512, dtype=torch.int32), 16, 1600, 8192)
    laid = LaidNodes(small, *(new(B * M),) * 3)
    found.append(_lay_launch(LevelNodes(*(new(M),) * 5), rows, laid))
    return [*found, *triton_growth.example_launches(), *triton_entry.example_launches()]
