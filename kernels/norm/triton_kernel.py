"""RMS normalisation in Triton: one row per program, float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs, begin_early

MAX_HIDDEN = 16384
_VALUES_PER_THREAD = 16  # two 128-bit loads of bfloat16 in flight
# A head of Llama 4, SmolLM2, Llama 1B, 8B, Llama 4, 70B, 405B
_KNOWN_SIZES = (128, 576, 2048, 4096, 5120, 8192, 16384)


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [T, H], rows x_stride apart
    residual_ptr,  # [T, H], rows residual_stride apart; or None
    weight_ptr,  # [H] float32
    out_ptr,  # [T, H] contiguous
    x_stride,
    residual_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least H
):
    """Row t: out = y / sqrt(mean(y^2) + eps) * weight; y is x, or residual + x, stored there."""
    begin_early()
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_row = residual_ptr + row * residual_stride + columns
        values += tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
        stored = values.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row, stored, mask=inside)
        values = stored.to(tl.float32)  # normalise the rounded sum, which later layers read
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / H + eps)
    normed = (values * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * H + columns, normed, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference: x [T, H], weight [H] float32 -> [T, H]. H is at most 16384."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out).run()
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference: add `x` to `residual` [T, H] in place, then normalise the sum."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    _launch(x, residual, weight, eps, out).run()
    return out


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Launch:
    T, H = x.shape
    assert H <= MAX_HIDDEN, f"hidden size {H}, at most {MAX_HIDDEN}"
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert residual is None or (residual.shape, residual.stride(1)) == (x.shape, 1)
    block = triton.next_power_of_2(H)
    name = "rms_norm" if residual is None else "add_rms_norm"
    return Launch(
        name=f"{name}[H={H}, {str(x.dtype).removeprefix('torch.')}]",
        kernel=_rms_norm_kernel,
        grid=(T,),
        arguments={
            "x_ptr": x,
            "residual_ptr": residual,
            "weight_ptr": weight,
            "out_ptr": out,
            "x_stride": x.stride(0),
            "residual_stride": 0 if residual is None else residual.stride(0),
            "eps": eps,
            "H": H,
            "BLOCK": block,
        },
        num_warps=min(max(block // (32 * _VALUES_PER_THREAD), 1), 32),
        min_load_bits=WIDEST_LOAD,
    )


def launches() -> list[Launch]:
    """What the engine launches, for the hidden sizes of the models we know."""
    found = []
    for H in _KNOWN_SIZES:
        x = torch.empty(64, H, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(H, dtype=torch.float32, device="meta")
        found += [_launch(x, None, weight, 1e-5, x), _launch(x, x, weight, 1e-5, x)]
    return found
