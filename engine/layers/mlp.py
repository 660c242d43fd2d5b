"""The gated feed-forward block of Llama."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.runner.forward import ForwardContext


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product (SwiGLU, arXiv:2002.05202)."""

    gate_up: ColumnParallelLinear  # H -> 2F, gate rows first
    down: RowParallelLinear  # F -> H

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.down(ctx.ops.silu_and_mul(self.gate_up(x, ctx)), ctx)
