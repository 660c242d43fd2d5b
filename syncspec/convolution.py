"""Convolution on a shape: each frequency of a function is multiplied by a learnt number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

NUM_SCALES = 3  # terms j of the dilated kernel
NUM_PARAMETERS = 1 + 2 * NUM_SCALES
KERNELS = ("dilated", "polynomial")


def dilated_terms(frequencies: Tensor, dilation: float) -> Tensor:
    """What the weights of a dilated kernel multiply at each frequency. [..., K] -> [..., K, 7]

    The multiplier is m(f) = w_0 + sum_j exp(-j g f) (a_j sin(pi j g f) + b_j cos(pi j g f)), with
    j = 1, 2, 3 and g the dilation: the first term, then sine and cosine of j = 1, and so on.
    Section 4.2 of arXiv:1612.00606. A larger g gives a kernel that is wider on the shape.
    """
    scale = torch.arange(1, NUM_SCALES + 1).to(frequencies) * dilation
    phase = frequencies[..., None] * scale  # [..., K, 3]
    waves = torch.stack([(math.pi * phase).sin(), (math.pi * phase).cos()], dim=-1)
    terms = (waves * torch.exp(-phase)[..., None]).flatten(-2)
    return torch.cat([torch.ones_like(frequencies)[..., None], terms], dim=-1)


def polynomial_terms(frequencies: Tensor, _dilation: float) -> Tensor:
    """Chebyshev polynomials T_0 to T_6 of f - 1, for the spectrum 0 to 2. [..., K] -> [..., K, 7]

    The kernel of Defferrard et al. (2016) has one scale and as many parameters.
    """
    angle = torch.arccos((frequencies - 1).clamp(-1, 1))
    return torch.cos(angle[..., None] * torch.arange(NUM_PARAMETERS).to(frequencies))


TERMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "dilated": dilated_terms,
    "polynomial": polynomial_terms,
}


class SpectralConvolution(nn.Module):
    """Channels in, channels out, with 7 parameters for each pair of them.

    The constant term of the kernel multiplies the function itself, so that it acts on all
    frequencies; the others act on the lowest K, which the basis holds.
    """

    def __init__(
        self, channels_in: int, channels_out: int, dilation: float, kernel: str = "dilated"
    ) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {kernel!r}; it must be one of {KERNELS}")
        self.dilation, self.kernel = dilation, kernel
        spread = 1 / math.sqrt(channels_in * 2)
        self.constant = nn.Parameter(torch.randn(channels_in, channels_out) * spread)
        waves = torch.randn(channels_in, NUM_PARAMETERS - 1, channels_out) * spread
        self.waves = nn.Parameter(waves)

    def forward(self, function: Tensor, frequencies: Tensor, vectors: Tensor) -> Tensor:
        """[B, N, C_in], [B, K], [B, N, K] -> [B, N, C_out]"""
        terms = TERMS[self.kernel](frequencies, self.dilation)[..., 1:]  # [B, K, 6]
        spectrum = vectors.transpose(1, 2) @ function  # [B, K, C_in]
        spread = (spectrum[..., None] * terms[:, :, None, :]).flatten(2)  # [B, K, C_in * 6]
        product: Tensor = spread @ self.waves.flatten(0, 1)
        return function @ self.constant + vectors @ product
