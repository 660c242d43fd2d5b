"""Rotary position embedding fused with the write into the paged cache, in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.scaled import FP8, LARGEST
from kernels.ops import UNSCALED, CacheScales
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

_Pair = tuple[Tensor, Tensor]
_VALUES_PER_WARP = 1024  # values of the query heads: 32 per thread
# (Hq, Hkv, D): SmolLM2, Llama 1B, 8B, 70B, 70B and Llama 4 over 8 GPUs
_KNOWN_HEADS = ((9, 3, 64), (32, 8, 64), (32, 8, 128), (64, 8, 128), (8, 1, 128), (5, 1, 128))


@triton.jit
def _as_kept(x, inverse, LARGEST: tl.constexpr):
    """As the reference, before the conversion."""
    if LARGEST is not None:
        x = tl.clamp(x.to(tl.float32) * inverse, -LARGEST, LARGEST, tl.PropagateNan.ALL)
    return x


@triton.jit
def _rope_kv_write_kernel(
    qkv_ptr,  # [T, (Hq + 2 Hkv) D], rows qkv_stride apart
    cos_sin_ptr,  # [max_len, D] float32: D / 2 cosines, then sines
    positions_ptr,  # [T] int64
    slots_ptr,  # [T] int64
    k_cache_ptr,  # slots k_slot_stride apart, heads k_head_stride apart
    v_cache_ptr,
    q_out_ptr,  # [T, Hq, D] contiguous
    qkv_stride,
    cos_sin_stride,
    k_slot_stride,
    k_head_stride,
    v_slot_stride,
    v_head_stride,
    k_inverse,  # keys and values are multiplied with these, if there is a largest number
    v_inverse,
    LARGEST: tl.constexpr,  # number that the cache holds; None if it holds what is written
    Hq: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    Q_BLOCK: tl.constexpr,  # powers of two, at least Hq, Hkv and D / 2
    KV_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """Program t: token t. Heads are the rows of a tile; each half of D is a tile of its own,
    because rotation pairs (i, i + D/2)."""
    await_inputs()
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token)
    HALF: tl.constexpr = D // 2
    pair = tl.arange(0, HALF_BLOCK)  # [D / 2]
    angles = cos_sin_ptr + position * cos_sin_stride + pair
    cos = tl.load(angles, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=pair < HALF, other=0.0)[None, :]
    row = qkv_ptr + token * qkv_stride + pair[None, :]

    q_head = tl.arange(0, Q_BLOCK)[:, None]
    inside = (q_head < Hq) & (pair[None, :] < HALF)
    low = tl.load(row + q_head * D, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(row + q_head * D + HALF, mask=inside, other=0.0).to(tl.float32)
    q_out = q_out_ptr + token * (Hq * D) + q_head * D + pair[None, :]
    out_type = q_out_ptr.dtype.element_ty
    tl.store(q_out, (low * cos - high * sin).to(out_type), mask=inside)
    tl.store(q_out + HALF, (high * cos + low * sin).to(out_type), mask=inside)

    kv_head = tl.arange(0, KV_BLOCK)[:, None]
    inside = (kv_head < Hkv) & (pair[None, :] < HALF)
    k_row = row + Hq * D + kv_head * D
    v_row = k_row + Hkv * D
    low = tl.load(k_row, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(k_row + HALF, mask=inside, other=0.0).to(tl.float32)
    v_low = _as_kept(tl.load(v_row, mask=inside, other=0.0), v_inverse, LARGEST)
    v_high = _as_kept(tl.load(v_row + HALF, mask=inside, other=0.0), v_inverse, LARGEST)
    k_low = _as_kept(low * cos - high * sin, k_inverse, LARGEST)
    k_high = _as_kept(high * cos + low * sin, k_inverse, LARGEST)
    k_out = k_cache_ptr + slot * k_slot_stride + kv_head * k_head_stride + pair[None, :]
    v_out = v_cache_ptr + slot * v_slot_stride + kv_head * v_head_stride + pair[None, :]
    k_type = k_cache_ptr.dtype.element_ty
    v_type = v_cache_ptr.dtype.element_ty
    tl.store(k_out, k_low.to(k_type), mask=inside)
    tl.store(k_out + HALF, k_high.to(k_type), mask=inside)
    tl.store(v_out, v_low.to(v_type), mask=inside)
    tl.store(v_out + HALF, v_high.to(v_type), mask=inside)


def rope_kv_write(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scales: CacheScales = UNSCALED,
) -> Tensor:
    """As the reference: rotates q and k of qkv [T, (Hq + 2 Hkv) D], stores k and v at `slots`,
    returns the rotated q [T, Hq, D]. No two `slots` may be equal."""
    Hkv, D = k_cache.shape[2:]
    q = torch.empty(len(qkv), qkv.shape[1] // D - 2 * Hkv, D, dtype=qkv.dtype, device=qkv.device)
    _launch(qkv, cos_sin, (positions, slots), (k_cache, v_cache), q, scales).run()
    return q


def _launch(
    qkv: Tensor, cos_sin: Tensor, places: _Pair, caches: _Pair, q: Tensor, scales: CacheScales
) -> Launch:
    T, Hq, D = q.shape
    Hkv = caches[0].shape[2]
    q_block, half_block = triton.next_power_of_2(Hq), triton.next_power_of_2(D // 2)
    sizes = {
        "Hq": Hq,
        "Hkv": Hkv,
        "D": D,
        "Q_BLOCK": q_block,
        "KV_BLOCK": triton.next_power_of_2(Hkv),
        "HALF_BLOCK": half_block,
        "k_inverse": 1.0 / scales.key,
        "v_inverse": 1.0 / scales.value,
        "LARGEST": LARGEST if caches[0].dtype is FP8 else None,
    }
    kinds = [str(x.dtype).removeprefix("torch.") for x in (q, *caches[:1])]
    return Launch(
        name=f"rope_kv_write[Hq={Hq}, Hkv={Hkv}, D={D}, {' to '.join(dict.fromkeys(kinds))}]",
        kernel=_rope_kv_write_kernel,
        grid=(T,),
        arguments=_arguments(qkv, cos_sin, places, caches, q) | sizes,
        num_warps=min(max(q_block * 2 * half_block // _VALUES_PER_WARP, 1), 8),
        min_load_bits=WIDEST_LOAD,
    )


def _arguments(
    qkv: Tensor, cos_sin: Tensor, places: _Pair, caches: _Pair, q: Tensor
) -> dict[str, Any]:
    """Tensors and strides, checked against what the kernel assumes."""
    assert (qkv.stride(1), cos_sin.stride(1), q.shape[2] % 2) == (1, 1, 0)
    assert all(index.dtype == torch.int64 and index.is_contiguous() for index in places)
    for cache in caches:  # the kernel finds a slot from its number alone
        assert (cache.stride(0), cache.stride(3)) == (cache.shape[1] * cache.stride(1), 1)
    k_cache, v_cache = caches
    return {
        "qkv_ptr": qkv,
        "cos_sin_ptr": cos_sin,
        "positions_ptr": places[0],
        "slots_ptr": places[1],
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "q_out_ptr": q,
        "qkv_stride": qkv.stride(0),
        "cos_sin_stride": cos_sin.stride(0),
        "k_slot_stride": k_cache.stride(1),
        "k_head_stride": k_cache.stride(2),
        "v_slot_stride": v_cache.stride(1),
        "v_head_stride": v_cache.stride(2),
    }


def launches() -> list[Launch]:
    """What the engine launches, for the heads of the models we know."""
    found = []
    for Hq, Hkv, D in _KNOWN_HEADS:
        qkv = torch.empty(64, (Hq + 2 * Hkv) * D, dtype=torch.bfloat16, device="meta")
        cos_sin = torch.empty(8192, D, dtype=torch.float32, device="meta")
        index = torch.empty(64, dtype=torch.int64, device="meta")
        q = torch.empty(64, Hq, D, dtype=torch.bfloat16, device="meta")
        for dtype in (torch.bfloat16, FP8):
            cache = torch.empty(1024, 16, Hkv, D, dtype=dtype, device="meta")
            found.append(_launch(qkv, cos_sin, (index, index), (cache, cache), q, UNSCALED))
    return found
