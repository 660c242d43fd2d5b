"""RMS normalisation over a residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.runner.forward import ForwardContext


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467)."""

    weight: Tensor  # [H] float32
    eps: float

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return ctx.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, ctx: ForwardContext) -> Tensor:
        """Add `x` to `residual` in place and return the normalised sum."""
        return ctx.ops.add_rms_norm(x, residual, self.weight, self.eps)
