"""From cache positions to slots, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def slots_of(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots [B, n] int64 of cache positions [B, n] of rows with tables [B, max_blocks]."""
    blocks = block_tables.gather(1, positions // block_size).long()
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

    def instead_of(self, slots: Tensor, wanted: Tensor, order: Tensor) -> Tensor:
        """`slots` [B, n] where `wanted` [B, n], elsewhere the scratch slot number `order` [B, n]
        (modulo the block size)."""
        return torch.where(wanted, slots, self.block * self.block_size + order % self.block_size)
