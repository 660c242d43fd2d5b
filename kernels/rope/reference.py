"""Rotary position embedding and the write into the paged cache, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv.reference import as_kept, bits, slots_of
from kernels.ops import UNSCALED, CacheScales


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) by their position's angle (arXiv:2104.09864, rotate-half layout).

    Args:
        x: [T, heads, D].
        cos_sin: [max_len, D] float32, cosines of D/2 frequencies, then sines.
        positions: [T] int64.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D / 2]
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def rope_kv_write(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scales: CacheScales = UNSCALED,
) -> Tensor:
    """Split qkv [T, (Hq + 2 Hkv) D], rotate q and k, store k and v at `slots` [T].

    The caches are [num_blocks, S, Hkv, D]. Returns the rotated q [T, Hq, D].
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(len(qkv), -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    rotated = (rotate(k, cos_sin, positions), v)
    for cache, entries, scale in zip((k_cache, v_cache), rotated, scales, strict=True):
        slots_of(cache)[slots] = bits(as_kept(entries, scale, cache.dtype))
    return rotate(q, cos_sin, positions)
