"""The steps between the forwards of a draft head in C++; see kernels/drafting/native_kernel.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.drafting.nodes import (
    LaidNodes,
    LevelNodes,
    ReadyRoots,
    RootStates,
    RowPlaces,
    evenly,
)
from kernels.native.library import NativeLibrary

NO_WINDOW = -1


class NativeDrafting:
    """Small operations, each one call instead of many of torch. States are float32."""

    def __init__(self, library: NativeLibrary) -> None:
        self._pool = library.pool
        self._ready_roots = library.call("aerie_ready_roots")
        self._first_keys = library.call("aerie_first_keys")
        self._keep_states = library.call("aerie_keep_states")
        self._lay_levels = library.call("aerie_lay_levels")

    def ready_roots(self, roots: RootStates) -> ReadyRoots:
        B, H = len(roots.lines), roots.states.shape[1]
        rows = [part.contiguous() for part in (roots.lines, roots.positions, roots.max_nodes)]
        kept = (roots.states, roots.state_positions, roots.firsts)
        assert all(part.is_contiguous() for part in kept)
        num_slots, sizes = torch.empty(2, B, dtype=torch.int64).unbind()
        ready, faults = torch.empty(2, B, dtype=torch.bool).unbind()
        states, first_keys = torch.empty(B, H), torch.empty(B, dtype=torch.int32)
        out = (states, ready, faults, num_slots, first_keys, sizes)
        self._ready_roots(
            self._pool,
            *(part.data_ptr() for part in (*rows, *kept)),
            B,
            H,
            roots.num_drafted,
            NO_WINDOW if roots.window is None else roots.window,
            *(part.data_ptr() for part in out),
        )
        return ReadyRoots(*out)

    def first_keys(
        self, firsts: Tensor, lines: Tensor, prefix_lens: Tensor, window: int | None
    ) -> Tensor:
        out = torch.empty(len(lines), dtype=torch.int32)
        lines, prefix_lens = lines.contiguous(), prefix_lens.contiguous()
        self._first_keys(
            self._pool,
            firsts.data_ptr(),
            lines.data_ptr(),
            prefix_lens.data_ptr(),
            prefix_lens.dtype is torch.int64,
            len(lines),
            NO_WINDOW if window is None else window,
            out.data_ptr(),
        )
        return out

    def keep_states(
        self,
        kept_states: Tensor,
        kept_positions: Tensor,
        lines: Tensor,
        states: Tensor,
        last: Tensor,
        newest: Tensor,
    ) -> None:
        assert kept_states.is_contiguous()
        assert kept_positions.is_contiguous()
        rows = [part.contiguous() for part in (lines, states, last, newest)]
        self._keep_states(
            self._pool,
            kept_states.data_ptr(),
            kept_positions.data_ptr(),
            *(part.data_ptr() for part in rows),
            len(lines),
            kept_states.shape[1],
        )

    def lay_levels(self, nodes: LevelNodes, rows: RowPlaces) -> LaidNodes:
        (M,), (B, columns) = nodes.nodes.shape, rows.tables.shape
        spread = evenly(B)
        positions, slots, masks = torch.zeros(3, M * spread, dtype=torch.int64).unbind()
        each = (nodes.nodes, nodes.depths, nodes.masks, nodes.firsts, nodes.widths)
        places = [part.contiguous() for part in (rows.positions, rows.num_slots, rows.tables)]
        self._lay_levels(
            self._pool,
            *(part.data_ptr() for part in each),
            M,
            *(part.data_ptr() for part in places),
            B,
            columns,
            rows.block_size,
            rows.first_scratch,
            rows.max_len,
            spread,
            *(part.data_ptr() for part in (positions, slots, masks)),
        )
        return LaidNodes(rows.positions.int(), positions, slots, masks)
