"""From cache positions to slots, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def slots_of(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots [B, n] int64 of cache positions [B, n] of rows with tables [B, max_blocks]; some slot
    for positions that a table does not reach."""
    columns = (positions // block_size).clamp(max=block_tables.shape[1] - 1)
    blocks = block_tables.gather(1, columns).long()
    return blocks * block_size + positions % block_size


def seen_of(ancestors: Tensor, alive: Tensor) -> Tensor:
    """Ancestor masks [B, n] in which nodes that are not `alive` see the root only. What they wrote
    lies elsewhere, and their own places may hold anything: NaN there would spread, since zero times
    NaN is NaN, to all queries that a kernel computes together."""
    return torch.where(alive, ancestors, 1)


@dataclass(frozen=True, slots=True)
class Scratch:
    """A block that belongs to no row: what nobody reads is written there."""

    block: int
    block_size: int

    @property
    def first_slot(self) -> int:
        return self.block * self.block_size

    def instead_of(self, slots: Tensor, wanted: Tensor, order: Tensor) -> Tensor:
        """`slots` where `wanted`, elsewhere the scratch slot number `order`, modulo the block size.
        All have one shape."""
        return torch.where(wanted, slots, self.first_slot + order % self.block_size)
