"""Tables of rotary embeddings for every kind of scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.checkpoints.rope_scaling import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
)


def cos_sin_table(head_dim: int, max_len: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[max_len, head_dim] float32: cosines of all frequencies, then sines (arXiv:2104.09864).

    Keys stay in the cache as they were rotated, so one table serves every sequence. `dynamic`
    scaling asks for another one at every length beyond the original context: this is the one for
    `max_len` tokens, as in vLLM.
    """
    if isinstance(scaling, DynamicRopeScaling):
        theta = dynamic_theta(head_dim, max_len, theta, scaling)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)  # [D / 2] radians per position
    magnitude = 1.0
    if isinstance(scaling, LinearRopeScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, Llama3RopeScaling):
        frequencies = scale_llama3(frequencies, scaling)
    elif isinstance(scaling, YarnRopeScaling):
        frequencies = scale_yarn(frequencies, theta, scaling)
        magnitude = scaling.attention_factor
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude


def dynamic_theta(head_dim: int, length: int, theta: float, scaling: DynamicRopeScaling) -> float:
    """The base for a sequence of `length` tokens."""
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    stretch = factor * max(length, original) / original - (factor - 1)
    return float(theta * stretch ** (head_dim / (head_dim - 2)))


def scale_llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, blend in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = context / wavelengths
    # Llama 4 Scout has equal factors: nothing lies in between.
    keep = (turns >= high).float() if low == high else ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def scale_yarn(frequencies: Tensor, theta: float, scaling: YarnRopeScaling) -> Tensor:
    """As Llama 3, but blended linearly in the index of the frequency (arXiv:2309.00071)."""
    count = len(frequencies)

    def index(turns: float) -> float:
        """Of the frequency that makes `turns` turns over the original context."""
        context = scaling.original_max_position_embeddings
        return count * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(count, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)
