"""Products with weights of four bits in groups, on CUDA devices. Activations keep their type.

A code is a small whole number, exact in bfloat16; so codes are multiplied, and sums over a group
are scaled in float32. With minimums, a group adds its minimum times the sum of its inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.grouped import GroupedWeight, GroupLayout
from kernels.linear.triton_scaled import product_type
from kernels.ops import LinearWeight
from kernels.triton_launch import Launch
from kernels.triton_overlap import await_inputs

_FEW_ROWS, _MANY_ROWS = 16, 64  # of a tile
_MOST_INPUTS = 128  # of a tile
# (K, N): the products of Llama 8B on one GPU and of 70B over 8 GPUs
_KNOWN_SIZES = ((4096, 6144), (14336, 4096), (8192, 7168), (3584, 8192))


@triton.jit
def group_product(
    x,  # [BLOCK_M, BLOCK_K]
    codes_ptr,  # of the first of these inputs, [BLOCK_N, 1] outputs
    scales_ptr,
    minimums_ptr,
    places,  # [BLOCK_N] of the outputs' scales
    some,  # [BLOCK_N] which outputs there are
    BLOCK_K: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """x times the weights of BLOCK_K inputs, which are in one group: [BLOCK_M, BLOCK_N] float32."""
    byte = tl.arange(0, BLOCK_K // 2)
    pairs = tl.load(codes_ptr + byte[None, :], mask=some[:, None], other=0)
    codes = tl.interleave((pairs & 15).to(tl.int8), (pairs >> 4).to(tl.int8))
    if minimums_ptr is None:
        codes -= 8
    part = tl.dot(x.to(PRODUCT), tl.trans(codes.to(PRODUCT)), input_precision="ieee")
    part *= tl.load(scales_ptr + places, mask=some, other=0.0).to(tl.float32)[None, :]
    if minimums_ptr is not None:
        least = tl.load(minimums_ptr + places, mask=some, other=0.0).to(tl.float32)
        part += tl.sum(x.to(tl.float32), axis=1)[:, None] * least[None, :]
    return part


@triton.jit
def grouped_linear_kernel(
    out_ptr,  # [T, N], rows out_stride apart
    x_ptr,  # [T, K], rows x_stride apart
    codes_ptr,  # [N, K / 2] uint8, contiguous: code 2 j in the lower half of byte j
    scales_ptr,  # [N, K / GROUP], contiguous
    minimums_ptr,  # the same, or None
    bias_ptr,  # [N] float32, or None
    T,
    out_stride,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # inputs per scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP
    PRODUCT: tl.constexpr,  # input type of the matrix products
):
    """A tile of outputs. Grid (blocks of N, blocks of T)."""
    await_inputs()
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    some_rows, some_columns = rows < T, columns < N
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    code_rows = codes_ptr + columns.to(tl.int64)[:, None] * (K // 2)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=some_rows[:, None], other=0.0)
        places = columns * (K // GROUP) + start // GROUP
        total += group_product(
            x,
            code_rows + start // 2,
            scales_ptr,
            minimums_ptr,
            places,
            some_columns,
            BLOCK_K,
            PRODUCT,
        )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=some_columns, other=0.0)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    inside = some_rows[:, None] & some_columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def pack_groups(weight: GroupedWeight, bias: Tensor | None) -> LinearWeight:
    """Codes as `GroupedWeight.pairs`."""
    minimums = None if weight.minimums is None else weight.minimums.contiguous()
    scales = weight.scales.contiguous()
    return LinearWeight(weight.pairs, bias, *weight.shape, weight.layout, scales, minimums)


def unpacked_rows(weight: LinearWeight, rows: Tensor) -> Tensor:
    """The numbers of these rows, [T] int64 -> [T, K] float32."""
    pairs, scales = weight.data[rows], weight.scales
    assert scales is not None
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).reshape(len(rows), -1)
    minimums = None if weight.minimums is None else weight.minimums[rows]
    return GroupedWeight(codes, scales[rows], minimums, 4).dequantised()


def linear_groups(out: Tensor, x: Tensor, weight: LinearWeight) -> None:
    """Write x [T, K] times a weight of four bits to out [T, N], whose rows may lie apart."""
    _product(out, x if x.stride(-1) == 1 else x.contiguous(), weight).run()


def _product(out: Tensor, x: Tensor, weight: LinearWeight) -> Launch:
    (T, K), N, layout = x.shape, weight.out_features, weight.layout
    assert isinstance(layout, GroupLayout)
    block_m = _FEW_ROWS if T <= _FEW_ROWS else _MANY_ROWS
    kind = str(x.dtype).removeprefix("torch.")
    least = ", minimums" if layout.has_minimums else ""
    name = f"grouped_linear[{K} to {N}, rows={block_m}, group={layout.group}{least}, {kind}]"
    return Launch(
        name=name,
        kernel=grouped_linear_kernel,
        grid=(triton.cdiv(N, _block_n(block_m)), triton.cdiv(T, block_m)),
        arguments={"out_ptr": out, "out_stride": out.stride(0), "x_ptr": x, "x_stride": x.stride(0)}
        | {"codes_ptr": weight.data, "scales_ptr": weight.scales}
        | {"minimums_ptr": weight.minimums, "bias_ptr": weight.bias}
        | {"T": T, "N": N, "K": K, "GROUP": layout.group}
        | {
            "BLOCK_M": block_m,
            "BLOCK_N": _block_n(block_m),
            "BLOCK_K": inputs_at_once(layout.group),
            "PRODUCT": product_type(x),
        },
        num_warps=4,
        num_stages=4 if block_m == _FEW_ROWS else 3,
        wgmma=block_m == _MANY_ROWS,
    )


def _block_n(block_m: int) -> int:
    return 32 if block_m == _FEW_ROWS else 64


def inputs_at_once(group: int) -> int:
    """The largest power of two that divides a group, at most 128."""
    return min(_MOST_INPUTS, group & -group)


def launches() -> list[Launch]:
    """What the engine launches, for the models we know."""
    found = []
    kinds = (GroupLayout(4, 128, False, False), GroupLayout(4, 128, True, True))
    cases = [(size, kinds[0]) for size in _KNOWN_SIZES] + [(_KNOWN_SIZES[0], kinds[1])]
    for (K, N), layout in cases:
        dtype = torch.float32 if layout.wide_scales else torch.float16
        scales = torch.empty(N, K // layout.group, dtype=dtype, device="meta")
        codes = torch.empty(N, K // 2, dtype=torch.uint8, device="meta")
        least = scales if layout.has_minimums else None
        weight = LinearWeight(codes, None, N, K, layout, scales, least)
        for T in (1, 512):
            x, out = (torch.empty(T, w, dtype=torch.bfloat16, device="meta") for w in (K, N))
            found.append(_product(out, x, weight))
    return found
