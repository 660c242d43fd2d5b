"""Gated activations in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

_BLOCK = 1024  # columns per program: one 128-bit load of each half per thread
_KNOWN_SIZES = (1536, 8192, 14336, 28672)  # SmolLM2, Llama 1B, 8B, 70B


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr,  # [T, 2F], rows `stride` apart; the gate first
    out_ptr,  # [T, F] contiguous
    stride,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, b): columns b * BLOCK .. of row t, silu(gate) * up in float32."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate_row = gate_up_ptr + row * stride + columns
    gate = tl.load(gate_row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + F, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + columns, gated.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As the reference: [T, 2F] with the gate first -> [T, F]."""
    T, both = gate_up.shape
    out = torch.empty(T, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    _launch(gate_up, out).run()
    return out


def _launch(gate_up: Tensor, out: Tensor) -> Launch:
    T, F = out.shape
    assert gate_up.shape == (T, 2 * F)
    assert gate_up.stride(1) == 1
    return Launch(
        name=f"silu_and_mul[F={F}, {str(out.dtype).removeprefix('torch.')}]",
        kernel=_silu_and_mul_kernel,
        grid=(T, triton.cdiv(F, _BLOCK)),
        arguments={
            "gate_up_ptr": gate_up,
            "out_ptr": out,
            "stride": gate_up.stride(0),
            "F": F,
            "BLOCK": _BLOCK,
        },
        num_warps=4,
        min_load_bits=WIDEST_LOAD,
    )


def launches() -> list[Launch]:
    """What the engine launches, for the feed-forward sizes of the models we know."""
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    return [
        _launch(torch.empty(64, 2 * F, **meta), torch.empty(64, F, **meta)) for F in _KNOWN_SIZES
    ]
