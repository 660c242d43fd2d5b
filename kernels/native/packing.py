"""Packs what rows commit in C++; see kernels/packing/native_kernel.cpp."""

from __future__ import annotations

from dataclasses import fields

import torch

from kernels.native.library import NativeLibrary
from kernels.packing.entries import BY_ENTRY, PackedEntries, Walks


class NativePacking:
    """Makes the entries of all rows in one call."""

    def __init__(self, library: NativeLibrary) -> None:
        self._pool = library.pool
        self._pack_entries = library.call("aerie_pack_entries")

    def pack_entries(self, walks: Walks) -> PackedEntries:
        """What is left as padding is not set."""
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
            *(part.data_ptr() for part in out),
        )
        return room


def _room_for(B: int, E: int) -> PackedEntries:
    """All but the masks are unset."""
    last, newest = torch.empty(2, B, dtype=torch.int64).unbind()
    entries = torch.empty(len(BY_ENTRY) - 1, B * E, dtype=torch.int64).unbind()
    cu, cu_q = (torch.empty(B + 1, dtype=dtype) for dtype in (torch.int64, torch.int32))
    prefix_lens, masks = torch.empty(B, dtype=torch.int32), torch.zeros(B * E, dtype=torch.int64)
    return PackedEntries(cu, cu_q, prefix_lens, last, newest, *entries, masks)
