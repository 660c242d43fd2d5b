"""Rotary position tables, with the frequency scaling of Llama 3.1 and later."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.arch import Llama3RopeScaling


def cos_sin_table(
    head_dim: int, max_len: int, theta: float, scaling: Llama3RopeScaling | None
) -> Tensor:
    """[max_len, head_dim] float32: cosines of all frequencies, then sines (arXiv:2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)  # [D / 2] radians per position
    if scaling is not None:
        frequencies = scale_llama3(frequencies, scaling)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def scale_llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow down long wavelengths by `factor`, keep short ones, blend between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies
