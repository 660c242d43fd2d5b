"""RMS normalisation (arXiv:1910.07467) in plain torch."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32.

    Args:
        x: [T, H].
        weight: [H] float32.
    """
    wide = x.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add(eps).rsqrt()
    return (wide * scale * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual` [T, H] in place, then normalise the sum."""
    residual += x
    return rms_norm(residual, weight, eps)
