"""Products with FP8 weights on CUDA devices of compute capability 8.9 and above.

Inputs are rounded to FP8, too, with a scale for each row (and block of inputs, if the weight has
scales for blocks), unless the weight's layout says that they are not. Sums are in float32; matrix
instructions of Hopper keep fewer bits inside one product of a block, so every block begins at zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.scaled import FP8, LARGEST, ScaledLayout, ScaledWeight
from kernels.ops import LinearWeight
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

_CHUNK = 2048  # numbers of a row that are rounded at once
_FEW_ROWS, _SOME_ROWS, _MANY_ROWS = 16, 64, 128  # of a tile
_WIDE = 8192  # outputs from which tiles of few rows are wider
_NO_BOUND = float("inf")
# (K, N): the products of Llama 8B on one GPU and of 70B over 8 GPUs
_KNOWN_SIZES = ((4096, 6144), (14336, 4096), (8192, 1280), (8192, 7168), (3584, 8192))


@triton.jit
def _numbers(row_ptr, start, end, CHUNK: tl.constexpr):
    """Some places of a row, which of them are before `end`, and the numbers there as float32."""
    k = start + tl.arange(0, CHUNK)
    inside = k < end
    return k, inside, tl.load(row_ptr + k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def round_rows_kernel(
    out_ptr,  # [T, K] FP8, contiguous
    scales_ptr,  # [T, blocks] float32, contiguous
    x_ptr,  # [T, K], rows x_stride apart
    factors_ptr,  # [T] float32, or None
    x_stride,
    bound,  # of the numbers; larger ones are cut off
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # numbers per scale
    CHUNK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Round a block of a row, times its factor. Grid (T, blocks)."""
    await_inputs()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = block * BLOCK
    end = tl.minimum(first + BLOCK, K)
    factor = 1.0 if factors_ptr is None else tl.load(factors_ptr + row)
    largest = tl.zeros([CHUNK], dtype=tl.float32)
    for start in range(0, BLOCK, CHUNK):
        _, _, x = _numbers(x_ptr + row * x_stride, first + start, end, CHUNK)
        largest = tl.maximum(largest, tl.abs(x * factor))
    most = tl.minimum(tl.max(largest, axis=0), bound)
    scale = tl.where(most > 0.0, most / LARGEST, 1.0)
    tl.store(scales_ptr + row * tl.num_programs(1) + block, scale)
    for start in range(0, BLOCK, CHUNK):
        k, inside, x = _numbers(x_ptr + row * x_stride, first + start, end, CHUNK)
        rounded = tl.clamp(x * factor / scale, -LARGEST, LARGEST, tl.PropagateNan.ALL)
        tl.store(out_ptr + row * K + k, rounded.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scaled_linear_kernel(
    out_ptr,  # [T, N], rows out_stride apart
    x_ptr,  # [T, K] contiguous: FP8, or as the activations are
    x_scales_ptr,  # [T, BLOCKS] float32, or None
    weight_ptr,  # [N, K] FP8, contiguous
    scales_ptr,  # [N, BLOCKS] float32, contiguous
    bias_ptr,  # [N] float32, or None
    T,
    out_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # inputs per scale
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRODUCT: tl.constexpr,  # input type of the matrix products
):
    """A tile of outputs. Grid (blocks of N, blocks of T)."""
    await_inputs()
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    some_rows, some_columns = rows < T, columns < N
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * K
    weight_rows = weight_ptr + columns.to(tl.int64)[:, None] * K
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < K)[None, :]
        x = tl.load(x_rows + k[None, :], mask=some_rows[:, None] & inside, other=0.0)
        weight = tl.load(weight_rows + k[None, :], mask=some_columns[:, None] & inside, other=0.0)
        part = tl.dot(x.to(PRODUCT), tl.trans(weight.to(PRODUCT)), input_precision="ieee")
        if BLOCKS > 1:
            places = columns * BLOCKS + start // BLOCK
            part *= tl.load(scales_ptr + places, mask=some_columns, other=0.0)[None, :]
            if x_scales_ptr is not None:
                places = rows * BLOCKS + start // BLOCK
                part *= tl.load(x_scales_ptr + places, mask=some_rows, other=0.0)[:, None]
        total += part
    if BLOCKS == 1:
        total *= tl.load(scales_ptr + columns, mask=some_columns, other=0.0)[None, :]
        if x_scales_ptr is not None:
            total *= tl.load(x_scales_ptr + rows, mask=some_rows, other=0.0)[:, None]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=some_columns, other=0.0)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    inside = some_rows[:, None] & some_columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def pack_scaled(weight: ScaledWeight, bias: Tensor | None) -> LinearWeight:
    """Kept as it is."""
    values, scales = weight.values.contiguous(), weight.scales.contiguous()
    return LinearWeight(values, bias, *weight.shape, weight.layout, scales)


def linear_scaled(out: Tensor, x: Tensor, weight: LinearWeight) -> None:
    """Write x [T, K] times an FP8 weight to out [T, N], whose rows may lie apart."""
    layout = weight.layout
    assert isinstance(layout, ScaledLayout)
    scales = None
    if layout.rounds_inputs:
        x, scales = round_rows(x, layout)
    _product(out, x.contiguous(), scales, weight).run()


def round_rows(
    x: Tensor, layout: ScaledLayout, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, K], times `factors` [T] float32, as FP8 numbers [T, K] and scales [T, blocks]
    float32."""
    T, K = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    values = torch.empty(T, K, dtype=FP8, device=x.device)
    scales = torch.empty(T, triton.cdiv(K, layout.block), device=x.device)
    _rounding(values, scales, x, layout, factors).run()
    return values, scales


def _rounding(
    values: Tensor, scales: Tensor, x: Tensor, layout: ScaledLayout, factors: Tensor | None
) -> Launch:
    (T, K), dtype = x.shape, str(x.dtype).removeprefix("torch.")
    by_factor = "" if factors is None else ", factors"
    bound = layout.input_bound
    return Launch(
        name=f"round_rows[K={K}, block={layout.block}, {dtype}{by_factor}]",
        kernel=round_rows_kernel,
        grid=(T, scales.shape[1]),
        arguments={
            "out_ptr": values,
            "scales_ptr": scales,
            "x_ptr": x,
            "factors_ptr": factors,
            "x_stride": x.stride(0),
            "bound": _NO_BOUND if bound is None else bound,
            "K": K,
            "BLOCK": layout.block,
            "CHUNK": min(_CHUNK, triton.next_power_of_2(layout.block)),
            "LARGEST": LARGEST,
        },
        num_warps=4,
    )


def _product(out: Tensor, x: Tensor, scales: Tensor | None, weight: LinearWeight) -> Launch:
    (T, K), N = x.shape, weight.out_features
    assert weight.scales is not None
    assert isinstance(weight.layout, ScaledLayout)
    blocks = weight.scales.shape[1]
    tile = _tile(T, N, blocks)
    kind = str(x.dtype).removeprefix("torch.")
    return Launch(
        name=f"scaled_linear[{K} to {N}, rows={tile['BLOCK_M']}, blocks={blocks}, {kind}]",
        kernel=scaled_linear_kernel,
        grid=(triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(T, tile["BLOCK_M"])),
        arguments={"out_ptr": out, "out_stride": out.stride(0), "x_ptr": x, "x_scales_ptr": scales}
        | {"weight_ptr": weight.data, "scales_ptr": weight.scales, "bias_ptr": weight.bias}
        | {"T": T, "N": N, "K": K, "BLOCK": weight.layout.block, "BLOCKS": blocks}
        | {"PRODUCT": product_type(x), **tile},
        num_warps=8 if tile["BLOCK_M"] == _MANY_ROWS else 4,
        num_stages=5 if tile["BLOCK_M"] == _FEW_ROWS else 3,
        wgmma=tile["BLOCK_M"] > _FEW_ROWS,
        min_load_bits=WIDEST_LOAD,
    )


def _tile(T: int, N: int, blocks: int) -> dict[str, int]:
    """With few rows, the time is that of reading the weight: many small tiles of long rows."""
    if T <= _FEW_ROWS:
        wide = 64 if N >= _WIDE else 32
        return {"BLOCK_M": _FEW_ROWS, "BLOCK_N": wide, "BLOCK_K": 256 if blocks == 1 else 128}
    if T <= _SOME_ROWS:
        return {"BLOCK_M": _SOME_ROWS, "BLOCK_N": 64, "BLOCK_K": 128}
    return {"BLOCK_M": _MANY_ROWS, "BLOCK_N": 128, "BLOCK_K": 128}


def product_type(x: Tensor) -> Any:
    """Of the inputs of matrix products."""
    if x.device.type == "cpu" or x.dtype == torch.float32:  # the interpreter multiplies these
        return tl.float32
    return tl.float8e4nv if x.dtype == FP8 else tl.bfloat16


def launches() -> list[Launch]:
    """What the engine launches, for the models we know."""
    found = {}
    for K, N in _KNOWN_SIZES:
        layout = ScaledLayout(K, True, None)
        for T in (1, 64, 512):
            x = torch.empty(T, K, dtype=torch.bfloat16, device="meta")
            for launch in _of_size(x, N, layout):
                found[launch.name] = launch
    x = torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    for layout in (ScaledLayout(128, True, None), ScaledLayout(4096, False, None)):
        for launch in _of_size(x, 4096, layout):
            found[launch.name] = launch
    return list(found.values())


def _of_size(x: Tensor, N: int, layout: ScaledLayout) -> list[Launch]:
    T, K = x.shape
    blocks = triton.cdiv(K, layout.block)
    values = torch.empty(N, K, dtype=FP8, device="meta")
    scales = torch.empty(N, blocks, device="meta")
    weight = LinearWeight(values, None, N, K, layout, scales)
    out = torch.empty(T, N, dtype=x.dtype, device="meta")
    if not layout.rounds_inputs:
        return [_product(out, x, None, weight)]
    rounded, own = torch.empty_like(x, dtype=FP8), torch.empty(T, blocks, device="meta")
    return [_rounding(rounded, own, x, layout, None), _product(out, rounded, own, weight)]
