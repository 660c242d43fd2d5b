"""Tokens in the order of their experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.ops import ExpertWeights


@dataclass(frozen=True, slots=True)
class Runs:
    """Tokens sorted by expert. All shapes follow from those of the logits."""

    order: Tensor  # [T] int64 tokens
    experts: Tensor  # [T] int64 of the sorted tokens
    begins: Tensor  # [runs + 1] int32; runs that do not exist begin and end after the others
    per_expert: int  # tokens, on average

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int, held: range | None = None) -> Runs:
        """`held`: the experts that get runs, and are counted from the first of them. None: all."""
        per_expert = len(chosen) // num_experts
        if held is not None:
            chosen = chosen - held.start
            is_held = (chosen >= 0) & (chosen < len(held))
            chosen, num_experts = torch.where(is_held, chosen, len(held)), len(held) + 1
        experts, order = chosen.sort(stable=True)
        new = torch.ones_like(experts)
        new[1:] = experts[1:] != experts[:-1]
        bounds = torch.arange(min(num_experts, len(chosen)) + 1, device=chosen.device)
        begins = torch.searchsorted(new.cumsum(0) - 1, bounds, out_int32=True)
        if held is not None:
            begins = torch.minimum(begins, is_held.sum().int())
        return cls(order, experts, begins, per_expert)

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


def new_outputs(x: Tensor, weights: ExpertWeights) -> Tensor:
    """For the outputs of tokens x [T, H]: zeros if some experts, and so some rows, are missing."""
    width = weights.down[0].out_features
    return x.new_empty(len(x), width) if weights.held is None else x.new_zeros(len(x), width)
