"""Packs nodes, and what rows commit, in C++; see kernels/packing/native_kernel.cpp."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from kernels.native.library import NativeLibrary
from kernels.packing.entries import BY_ENTRY, PackedEntries, Walks
from kernels.packing.nodes import NodeTrees, PackedNodes


class NativePacking:
    """Packs the nodes or the entries of all rows in one call."""

    def __init__(self, library: NativeLibrary) -> None:
        self._pool = library.pool
        self._pack_nodes = library.call("aerie_pack_nodes")
        self._pack_entries = library.call("aerie_pack_entries")

    def pack_nodes(self, trees: NodeTrees) -> PackedNodes:
        (B, N), R = trees.tokens.shape, trees.num_nodes
        rows = (trees.starts, trees.limits, trees.sizes, trees.tokens, trees.depths)
        settings = (trees.ancestors, trees.tables, trees.seeds, trees.temperatures)
        inputs = [part.contiguous() for part in (*rows, *settings)]
        cu, at = torch.empty(B + 1, dtype=torch.int64), torch.empty(B, N, dtype=torch.int64)
        cu_q, prefix_lens = (torch.empty(n, dtype=torch.int32) for n in (B + 1, B))
        nodes, temperatures = torch.empty(8, R, dtype=torch.int64), torch.empty(R)
        used, inside = (torch.empty(shape, dtype=torch.bool) for shape in (R, (B, N)))
        out = (cu, cu_q, prefix_lens, nodes, temperatures, used, at, inside)
        columns, sizes = trees.tables.shape[1], (trees.block_size, trees.first_scratch)
        self._pack_nodes(
            self._pool,
            *(part.data_ptr() for part in inputs),
            *(B, N, columns, *sizes, trees.max_len, R),
            *(part.data_ptr() for part in out),
        )
        row_of, place, tokens, positions, slots, ancestors, seeds, draw_positions = nodes.unbind()
        return PackedNodes(
            cu=cu,
            cu_q=cu_q,
            prefix_lens=prefix_lens,
            first_keys=torch.zeros(B, dtype=torch.int32),
            row_of=row_of,
            place=place,
            used=used,
            tokens=tokens,
            positions=positions,
            slots=slots,
            ancestors=ancestors,
            at=at,
            inside=inside,
            temperatures=temperatures,
            seeds=seeds,
            draw_positions=draw_positions,
            **{name: _of_rows(values, row_of) for name, values in trees.filters.items()},
        )

    def pack_entries(self, walks: Walks) -> PackedEntries:
        rows = (walks.starts, walks.lens, walks.ends, walks.samples, walks.next_tokens)
        nodes = (walks.path, walks.accepted, walks.emitted, walks.firsts, walks.tables)
        inputs = [part.contiguous() for part in (*rows, *nodes)]
        columns, room = walks.tables.shape[1], _room_for(*walks.path.shape)
        out = [getattr(room, part.name) for part in fields(room) if part.name != "masks"]
        self._pack_entries(
            self._pool,
            *(part.data_ptr() for part in inputs),
            *walks.path.shape,
            columns,
            walks.block_size,
            walks.first_scratch,
            *(part.data_ptr() for part in out),
        )
        return room


def _of_rows(values: Tensor | None, row_of: Tensor) -> Tensor | None:
    return None if values is None else values[row_of]


def _room_for(B: int, E: int) -> PackedEntries:
    """All but the masks are unset."""
    last, newest = torch.empty(2, B, dtype=torch.int64).unbind()
    entries = torch.empty(len(BY_ENTRY) - 1, B * E, dtype=torch.int64).unbind()
    cu, cu_q = (torch.empty(B + 1, dtype=dtype) for dtype in (torch.int64, torch.int32))
    prefix_lens, masks = torch.empty(B, dtype=torch.int32), torch.zeros(B * E, dtype=torch.int64)
    return PackedEntries(cu, cu_q, prefix_lens, last, newest, *entries, masks)
