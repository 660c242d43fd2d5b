"""From cache positions to slots, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def slots_of(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots [B, n] int64 of cache positions [B, n], by block tables [B, max_blocks]; an arbitrary
    slot for positions beyond the end of a table."""
    columns = (positions // block_size).clamp(max=block_tables.shape[1] - 1)
    blocks = block_tables.gather(1, columns).long()
    return blocks * block_size + positions % block_size


def seen_of(ancestors: Tensor, alive: Tensor) -> Tensor:
    """Ancestor masks [B, n] in which nodes that are not `alive` see only the root. Their keys and
    values went to the scratch block, so their own slots may hold NaN; zero times NaN is NaN, and
    it would spread to all queries that a kernel computes together."""
    return torch.where(alive, ancestors, 1)


@dataclass(frozen=True, slots=True)
class Scratch:
    """A block that belongs to no row: takes keys and values that nothing reads."""

    block: int
    block_size: int

    @property
    def first_slot(self) -> int:
        return self.block * self.block_size

    def instead_of(self, slots: Tensor, wanted: Tensor, order: Tensor) -> Tensor:
        """`slots` where `wanted`, elsewhere scratch slot `order` modulo the block size. All three
        tensors have the same shape."""
        return torch.where(wanted, slots, self.first_slot + order % self.block_size)
