"""Where keys and values go that nothing reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
