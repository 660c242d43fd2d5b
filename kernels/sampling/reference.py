"""Position-keyed Gumbel noise and draws from logits, in plain torch.

Every backend must produce the same noise integers; otherwise a seed would give different text on
different machines.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
GOLDEN64 = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed integer
MIX64_A = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
MIX64_B = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
GOLDEN32 = 0x9E3779B1


def noise_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """64-bit key of each (seed, position), [R] int64; two rounds of the splitmix64 finaliser.

    Args:
        seeds: [R] int64, the bits of the unsigned seed.
        positions: [R] int64, absolute position of the token to draw.
    """
    return mix64(mix64(seeds + GOLDEN64) + (positions + 1) * GOLDEN64)


def mix64(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on wrapping int64."""
    x = (x ^ _shift_right(x, 30)) * MIX64_A
    x = (x ^ _shift_right(x, 27)) * MIX64_B
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; the shift of int64 itself keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def fmix32(x: Tensor) -> Tensor:
    """The murmur3 finaliser on 32-bit values held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def noise_bits(keys: Tensor, tokens: Tensor) -> Tensor:
    """Uniform 32-bit integers of every (key [R], token id [V] or [R, V]), [R, V] int64."""
    low, high = keys & MASK32, _shift_right(keys, 32)
    mixed = fmix32((tokens * GOLDEN32 + low[:, None]) & MASK32)  # [R, V]
    return fmix32(mixed ^ high[:, None])


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(1 - v)), v = (bits + 1/2) / 2^32, float32.

    Large noise comes from small v, where float32 is most precise.
    """
    v = (bits.float() + 0.5) * 2.0**-32
    return -(-torch.log1p(-v.clamp(max=1 - 2.0**-24))).log()


def gumbel_argmax(logits: Tensor, keys: Tensor) -> Tensor:
    """A draw from softmax(logits) per row, [R] int64 (the Gumbel-max trick)."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    return (logits + gumbel(noise_bits(keys, tokens))).argmax(dim=1)


def argmax(logits: Tensor) -> Tensor:
    """[R, V] -> [R] int64, the lowest token id among equals."""
    return logits.argmax(dim=1)


def sound(logits: Tensor) -> Tensor:
    """[R, V] -> [R] bool: whether there is a highest logit, and it is finite."""
    return logits.amax(dim=1).isfinite()


def logsumexp(logits: Tensor) -> Tensor:
    """[R, V] -> [R]: log(sum(exp(logits)))."""
    return logits.logsumexp(dim=1)
