"""Packs the tokens that a step emitted, for a draft head that takes them, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packing.entries import PackedEntries, Walks
from kernels.packing.triton_parts import BLOCK, MAX_ROWS, find_places, store_starts
from kernels.triton_launch import Launch, pointers
from kernels.triton_overlap import await_inputs


@triton.jit
def _pack_entries_kernel(
    starts_ptr,  # as `Walks` says
    lens_ptr,
    ends_ptr,
    samples_ptr,
    next_tokens_ptr,
    path_ptr,
    accepted_ptr,
    emitted_ptr,
    firsts_ptr,
    tables_ptr,
    packed_cu_ptr,  # as `PackedEntries` says, from here on
    packed_cu_q_ptr,
    packed_prefix_lens_ptr,
    packed_last_ptr,
    packed_newest_ptr,
    packed_features_ptr,
    packed_tokens_ptr,
    packed_positions_ptr,
    packed_slots_ptr,
    packed_masks_ptr,
    tables_stride,
    first_scratch,
    B,
    C,
    E: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, at least B
    BLOCK: tl.constexpr,
):
    """Places p * BLOCK .. of the entries, grid (programs,)."""
    await_inputs()
    rows = tl.arange(0, ROWS)
    exists = rows < B
    starts = tl.load(starts_ptr + rows, mask=exists, other=0)
    lens = tl.load(lens_ptr + rows, mask=exists, other=0)
    ends = tl.load(ends_ptr + rows, mask=exists, other=0)
    samples = tl.load(samples_ptr + rows, mask=exists, other=0) != 0
    accepted = tl.load(accepted_ptr + rows, mask=exists, other=0)
    wanted = lens + tl.where(samples, accepted, 0)
    room = tl.maximum(ends - starts - 1, 0)
    counts = tl.where(exists, tl.minimum(wanted, room), 0).to(tl.int32)
    upto = tl.cumsum(counts, axis=0)  # [ROWS]

    order = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, place, used = find_places(order, counts, upto, rows, exists, B)
    place = tl.where(used, place, 0)
    stored = order < C
    emitted = tl.load(emitted_ptr + row * E + place, mask=used, other=0)
    sampled = tl.load(samples_ptr + row, mask=used, other=0) != 0
    following = tl.load(next_tokens_ptr + row, mask=used, other=0)
    token = tl.where((place == 0) & (sampled == 0), following, emitted)
    node = tl.load(path_ptr + row * E + place, mask=used, other=0)
    feature = tl.load(firsts_ptr + row, mask=used, other=0) + tl.maximum(node, 0)
    position = tl.load(starts_ptr + row, mask=used, other=0) + place + 1
    block_ptrs = tables_ptr + row.to(tl.int64) * tables_stride + position // BLOCK_SIZE
    block = tl.load(block_ptrs, mask=used, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    scratch = first_scratch + order % BLOCK_SIZE
    tl.store(packed_features_ptr + order, tl.where(used, feature, 0), mask=stored)
    tl.store(packed_tokens_ptr + order, tl.where(used, tl.maximum(token, 0), 0), mask=stored)
    tl.store(packed_positions_ptr + order, tl.where(used, position, 0), mask=stored)
    tl.store(packed_slots_ptr + order, tl.where(used, slot, scratch), mask=stored)
    tl.store(packed_masks_ptr + order, tl.zeros([BLOCK], dtype=tl.int64), mask=stored)

    if tl.program_id(0) == 0:
        store_starts(packed_cu_ptr, packed_cu_q_ptr, counts, upto, rows, exists, B)
        some = counts > 0
        tl.store(
            packed_prefix_lens_ptr + rows, tl.where(some, starts + 1, 0).to(tl.int32), mask=exists
        )
        tl.store(packed_last_ptr + rows, tl.maximum(upto - 1, 0).to(tl.int64), mask=exists)
        tl.store(packed_newest_ptr + rows, tl.where(some, starts + counts, -1), mask=exists)


def pack_entries(walks: Walks) -> PackedEntries:
    """The entries of all rows, packed."""
    (B, E), device = walks.path.shape, walks.path.device

    def new(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    packed = PackedEntries(
        cu=new(B + 1),
        cu_q=new(B + 1, torch.int32),
        prefix_lens=new(B, torch.int32),
        last=new(B),
        newest=new(B),
        features=new(B * E),
        tokens=new(B * E),
        positions=new(B * E),
        slots=new(B * E),
        masks=new(B * E),
    )
    launch(walks, packed).run()
    return packed


def launch(walks: Walks, packed: PackedEntries) -> Launch:
    B, E = walks.path.shape
    assert 0 < B <= MAX_ROWS
    assert walks.tables.stride(1) == 1
    whole = (walks.starts, walks.lens, walks.ends, walks.samples, walks.next_tokens, walks.path)
    assert all(part.is_contiguous() for part in (*whole, walks.accepted, walks.emitted))
    return Launch(
        name=f"pack_entries[E={E}]",
        kernel=_pack_entries_kernel,
        grid=(triton.cdiv(B * E, BLOCK),),
        arguments={
            **pointers("", walks),
            **pointers("packed_", packed),
            "tables_stride": walks.tables.stride(0),
            "first_scratch": walks.first_scratch,
            "B": B,
            "C": B * E,
            "E": E,
            "BLOCK_SIZE": walks.block_size,
            "ROWS": triton.next_power_of_2(B),
            "BLOCK": BLOCK,
        },
    )


def example_launches() -> list[Launch]:
    """A chain of 3 in 64 rows."""
    B, E = 64, 4
    integers = torch.empty(B, E, dtype=torch.int64, device="meta")
    row = integers[:, 0].contiguous()
    flags = torch.empty(B, dtype=torch.bool, device="meta")
    tables = integers.int()
    walks = Walks(row, row, row, flags, row, integers, row, integers, row, tables, 16, 1600)
    packed = PackedEntries(row, row.int(), row.int(), *(row,) * 7)
    return [launch(walks, packed)]
