"""Kernels that return the noise of the sampling kernels, for tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.triton_functions import gumbel, noise_bits, noise_key, waiting_bound


@triton.jit
def _noise_kernel(seeds_ptr, positions_ptr, tokens_ptr, bits_ptr, noise_ptr, COUNT: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, COUNT)
    key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    bits = noise_bits(key, tl.load(tokens_ptr + lanes).to(tl.int32))
    tl.store(bits_ptr + row * COUNT + lanes, bits.to(tl.int64))
    tl.store(noise_ptr + row * COUNT + lanes, gumbel(bits))


@triton.jit
def _gumbel_kernel(bits_ptr, noise_ptr, bound_ptr, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    bits = tl.load(bits_ptr + lanes).to(tl.uint32)
    tl.store(noise_ptr + lanes, gumbel(bits))
    tl.store(bound_ptr + lanes, waiting_bound(bits))


def noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The integers [R, V] int64 and the noise [R, V] of seeds [R], positions [R], tokens [V]."""
    bits = torch.empty(len(seeds), len(tokens), dtype=torch.int64, device=seeds.device)
    values = torch.empty(bits.shape, dtype=torch.float32, device=seeds.device)
    _noise_kernel[(len(seeds),)](seeds, positions, tokens, bits, values, COUNT=len(tokens))
    return bits, values


def gumbel_of(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The noise of integers [n] int64, n a power of two, and its upper bound."""

    values = torch.empty(2, len(bits), dtype=torch.float32, device=bits.device)
    _gumbel_kernel[(1,)](bits, values[0], values[1], COUNT=len(bits))
    return values[0], values[1]
