"""Tokens in the order of their experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Runs:
    """Tokens sorted by expert. All shapes follow from those of the logits."""

    order: Tensor  # [T] int64 tokens
    experts: Tensor  # [T] int64 of the sorted tokens
    begins: Tensor  # [runs + 1] int32; runs that do not exist begin and end at T

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int) -> Runs:
        experts, order = chosen.sort(stable=True)
        new = torch.ones_like(experts)
        new[1:] = experts[1:] != experts[:-1]
        bounds = torch.arange(min(num_experts, len(chosen)) + 1, device=chosen.device)
        begins = torch.searchsorted(new.cumsum(0) - 1, bounds, out_int32=True)
        return cls(order, experts, begins)

    def num_tiles(self, rows: int) -> int:
        """A bound for tiles of so many rows."""
        return len(self.order) // rows + len(self.begins) - 1

    def arguments(self) -> dict[str, Any]:
        return {
            "order_ptr": self.order,
            "experts_ptr": self.experts,
            "begins_ptr": self.begins,
            "num_runs": len(self.begins) - 1,
        }
