"""Packs the nodes of a step in Triton: one launch instead of some forty small ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packing import triton_entries, triton_rows, triton_settle
from kernels.packing.nodes import NodeTrees, PackedNodes
from kernels.packing.triton_parts import BLOCK, MAX_ROWS, find_places, of_rows, store_starts
from kernels.triton_launch import Launch, pointers
from kernels.triton_overlap import await_inputs


@triton.jit
def _pack_nodes_kernel(
    starts_ptr,  # as `NodeTrees` says
    limits_ptr,
    sizes_ptr,
    tokens_ptr,
    depths_ptr,
    ancestors_ptr,
    tables_ptr,
    temperatures_ptr,
    seeds_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    packed_cu_ptr,  # as `PackedNodes` says, from here on
    packed_cu_q_ptr,
    packed_prefix_lens_ptr,
    packed_first_keys_ptr,
    packed_row_of_ptr,
    packed_place_ptr,
    packed_used_ptr,
    packed_tokens_ptr,
    packed_positions_ptr,
    packed_slots_ptr,
    packed_ancestors_ptr,
    packed_at_ptr,
    packed_inside_ptr,
    packed_temperatures_ptr,
    packed_seeds_ptr,
    packed_draw_positions_ptr,
    packed_top_k_ptr,
    packed_top_p_ptr,
    packed_min_p_ptr,
    tokens_stride,
    depths_stride,
    ancestors_stride,
    tables_stride,
    first_scratch,
    max_len,
    B,
    R,
    N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, at least B
    BLOCK: tl.constexpr,
):
    """Places p * BLOCK .. of the packed nodes and of all [B, N] nodes, grid (programs,)."""
    await_inputs()
    rows = tl.arange(0, ROWS)
    exists = rows < B
    limits = tl.load(limits_ptr + rows, mask=exists, other=0)
    sizes = tl.load(sizes_ptr + rows, mask=exists, other=0)
    sizes = tl.where(limits > 0, sizes, 0).to(tl.int32)
    ends = tl.cumsum(sizes, axis=0)  # [ROWS]
    order = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    # The packed nodes
    row, place, used = find_places(order, sizes, ends, rows, exists, B)
    node = tl.where(used, place, 0)
    stored = order < R
    size = tl.load(sizes_ptr + row)
    start = tl.load(starts_ptr + row)
    token = tl.load(tokens_ptr + row * tokens_stride + node, mask=used, other=0)
    depth = tl.load(depths_ptr + row * depths_stride + node)
    mask = tl.load(ancestors_ptr + row * ancestors_stride + node, mask=used & (size > 1), other=0)
    cached = start + place
    column = tl.where(used, cached // BLOCK_SIZE, 0)
    block = tl.load(tables_ptr + row.to(tl.int64) * tables_stride + column, mask=used, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + cached % BLOCK_SIZE
    position = tl.minimum(tl.maximum(start + depth, 0), max_len - 1)
    tl.store(packed_row_of_ptr + order, row.to(tl.int64), mask=stored)
    tl.store(packed_place_ptr + order, place.to(tl.int64), mask=stored)
    tl.store(packed_used_ptr + order, used, mask=stored)
    tl.store(packed_tokens_ptr + order, token, mask=stored)
    tl.store(packed_positions_ptr + order, position, mask=stored)
    scratch = first_scratch + order % BLOCK_SIZE
    tl.store(packed_slots_ptr + order, tl.where(used, slot, scratch), mask=stored)
    tl.store(packed_ancestors_ptr + order, mask, mask=stored)
    temperature = tl.load(temperatures_ptr + row)
    tl.store(packed_temperatures_ptr + order, temperature, mask=stored)
    tl.store(packed_seeds_ptr + order, tl.load(seeds_ptr + row), mask=stored)
    tl.store(packed_draw_positions_ptr + order, start + 1 + depth, mask=stored)
    if top_k_ptr is not None:
        tl.store(packed_top_k_ptr + order, tl.load(top_k_ptr + row), mask=stored)
        tl.store(packed_top_p_ptr + order, tl.load(top_p_ptr + row), mask=stored)
        tl.store(packed_min_p_ptr + order, tl.load(min_p_ptr + row), mask=stored)

    # All nodes of all rows
    row = order // N
    node = order % N
    begin = of_rows(ends - sizes, row, rows)
    inside = node < of_rows(sizes, row, rows)
    stored = order < B * N
    tl.store(packed_at_ptr + order, tl.where(inside, begin + node, 0).to(tl.int64), mask=stored)
    tl.store(packed_inside_ptr + order, inside, mask=stored)

    if tl.program_id(0) == 0:
        store_starts(packed_cu_ptr, packed_cu_q_ptr, sizes, ends, rows, exists, B)
        starts = tl.load(starts_ptr + rows, mask=exists, other=0)
        tl.store(packed_prefix_lens_ptr + rows, starts.to(tl.int32), mask=exists)
        tl.store(packed_first_keys_ptr + rows, 0, mask=exists)


def pack_nodes(trees: NodeTrees) -> PackedNodes:
    """The nodes of all rows, packed."""
    packed = _empty(trees)
    _launch(trees, packed).run()
    return packed


def _empty(trees: NodeTrees) -> PackedNodes:
    (B, N), R, device = trees.tokens.shape, trees.num_nodes, trees.tokens.device

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    of_row, filters = ("row_of", "place", "tokens", "positions", "slots"), trees.filters
    of_row += ("ancestors", "seeds", "draw_positions")
    return PackedNodes(
        cu=new(B + 1),
        cu_q=new(B + 1, dtype=torch.int32),
        prefix_lens=new(B, dtype=torch.int32),
        first_keys=new(B, dtype=torch.int32),
        used=new(R, dtype=torch.bool),
        at=new(B, N),
        inside=new(B, N, dtype=torch.bool),
        temperatures=new(R, dtype=torch.float32),
        **{name: new(R) for name in of_row},
        **{
            name: None if values is None else new(R, dtype=values.dtype)
            for name, values in filters.items()
        },
    )


def _launch(trees: NodeTrees, packed: PackedNodes) -> Launch:
    (B, N), R = trees.tokens.shape, trees.num_nodes
    assert 0 < B <= MAX_ROWS
    assert trees.tables.stride(1) == 1
    wide = (trees.tokens, trees.depths, trees.ancestors)
    assert N == 1 or all(values.stride(1) == 1 for values in wide)
    narrow = (trees.starts, trees.limits, trees.sizes, trees.temperatures, trees.seeds)
    narrow += tuple(trees.filters.values())
    assert all(values.is_contiguous() for values in narrow if values is not None)
    return Launch(
        name=f"pack_nodes[N={N}{'' if trees.top_k is None else ', filtered'}]",
        kernel=_pack_nodes_kernel,
        grid=(triton.cdiv(max(R, B * N), BLOCK),),
        arguments={
            **pointers("", trees),
            **pointers("packed_", packed),
            "tokens_stride": trees.tokens.stride(0),
            "depths_stride": trees.depths.stride(0),
            "ancestors_stride": trees.ancestors.stride(0),
            "tables_stride": trees.tables.stride(0),
            "first_scratch": trees.first_scratch,
            "max_len": trees.max_len,
            "B": B,
            "R": R,
            "N": N,
            "BLOCK_SIZE": trees.block_size,
            "ROWS": triton.next_power_of_2(B),
            "BLOCK": BLOCK,
        },
    )


def launches() -> list[Launch]:
    """Plain steps and trees of 8 nodes, with and without filters; entries of a chain."""
    found = []
    for B, N, filtered in ((64, 1, False), (256, 8, True)):
        R = B * N
        integers = torch.empty(R, N, dtype=torch.int64, device="meta")
        floats = torch.empty(R, dtype=torch.float32, device="meta")
        flags = torch.empty(R, N, dtype=torch.bool, device="meta")
        row, small = integers[:, 0].contiguous(), integers[:, 0].int()
        filters = (row, floats, floats) if filtered else (None, None, None)
        trees = NodeTrees(
            *(row[:B],) * 3, *(integers[:B],) * 3, small.view(B, N), floats, row, *filters,
            num_nodes=R, block_size=16, first_scratch=1600, max_len=8192,
        )  # fmt: skip
        packed = PackedNodes(
            row, *(small,) * 3, *(row,) * 2, flags[:, 0], *(row,) * 4, integers[:B], flags[:B],
            floats, row, row, *filters,
        )  # fmt: skip
        found.append(_launch(trees, packed))
    return [
        *found,
        *triton_entries.example_launches(),
        *triton_rows.example_launches(),
        *triton_settle.example_launches(),
    ]
