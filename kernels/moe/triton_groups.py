"""A mixture of experts with weights of four bits: as triton_kernel.py, with other products.

Activations keep their type. Both products are linear in their inputs, so the router's score scales
their sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.triton_lookup import find_tile
from kernels.linear.grouped import GroupLayout
from kernels.linear.triton_groups import group_product, inputs_at_once
from kernels.linear.triton_scaled import product_type
from kernels.moe.triton_runs import Runs, new_outputs
from kernels.ops import ExpertWeights, LinearWeight
from kernels.triton_launch import Launch
from kernels.triton_overlap import await_inputs

_FEW_ROWS, _MANY_ROWS = 16, 64  # of a tile
_MANY = 32  # tokens per expert from which tiles have many rows
# E, H, F: Scout on one GPU, and Maverick over 8 GPUs
_KNOWN_SIZES = ((16, 5120, 8192), (128, 5120, 1024))


@triton.jit
def grouped_gate_up_kernel(
    inner_ptr,  # [T, F] contiguous, in the order of the runs
    x_ptr,  # [T, H], rows x_stride apart
    scores_ptr,  # [T] float32, by token
    order_ptr,  # [T] int64 tokens, sorted by expert
    experts_ptr,  # [T] int64 experts, sorted
    begins_ptr,  # [runs + 1] int32
    codes_ptr,  # [E, 2F, H / 2] uint8, contiguous, the gate first
    scales_ptr,  # [E, 2F, H / GROUP], contiguous
    minimums_ptr,  # the same, or None
    num_runs,
    x_stride,
    H: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,  # inputs per scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP
    PRODUCT: tl.constexpr,  # input type of the matrix products
):
    """silu(gate) * up of a tile. Grid (blocks of F, tiles)."""
    await_inputs()
    run, first = find_tile(tl.program_id(1), begins_ptr, num_runs, 1, BLOCK_M, True)
    begin = tl.load(begins_ptr + run)
    end = tl.load(begins_ptr + run + 1)
    if begin + first >= end:
        return
    rows = begin + first + tl.arange(0, BLOCK_M)
    wanted = rows < end
    tokens = tl.load(order_ptr + rows, mask=wanted, other=0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    some = columns < F
    x_rows = x_ptr + tokens[:, None] * x_stride
    outputs = tl.load(experts_ptr + begin) * (2 * F) + columns
    gate_codes = codes_ptr + outputs[:, None] * (H // 2)
    gate_places = outputs * (H // GROUP)
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=wanted[:, None], other=0.0)
        codes, places = gate_codes + start // 2, gate_places + start // GROUP
        gate += group_product(x, codes, scales_ptr, minimums_ptr, places, some, BLOCK_K, PRODUCT)
        codes += F * (H // 2)
        places += F * (H // GROUP)
        up += group_product(x, codes, scales_ptr, minimums_ptr, places, some, BLOCK_K, PRODUCT)
    scores = tl.load(scores_ptr + tokens, mask=wanted, other=0.0)[:, None]
    gate *= scores
    gated = gate / (1.0 + tl.exp(-gate)) * (up * scores)
    out = inner_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :]
    tl.store(out, gated.to(inner_ptr.dtype.element_ty), mask=wanted[:, None] & some[None, :])


@triton.jit
def grouped_down_kernel(
    out_ptr,  # [T, H] contiguous, by token
    inner_ptr,  # [T, F] contiguous, in the order of the runs
    order_ptr,  # [T] int64 tokens, sorted by expert
    experts_ptr,  # [T] int64 experts, sorted
    begins_ptr,  # [runs + 1] int32
    codes_ptr,  # [E, H, F / 2] uint8, contiguous
    scales_ptr,  # [E, H, F / GROUP], contiguous
    minimums_ptr,  # the same, or None
    num_runs,
    H: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """The outputs of a tile. Grid (blocks of H, tiles)."""
    await_inputs()
    run, first = find_tile(tl.program_id(1), begins_ptr, num_runs, 1, BLOCK_M, True)
    begin = tl.load(begins_ptr + run)
    end = tl.load(begins_ptr + run + 1)
    if begin + first >= end:
        return
    rows = begin + first + tl.arange(0, BLOCK_M)
    wanted = rows < end
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    some = columns < H
    outputs = tl.load(experts_ptr + begin) * H + columns
    code_rows = codes_ptr + outputs[:, None] * (F // 2)
    inner_rows = inner_ptr + rows.to(tl.int64)[:, None] * F
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, F, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inner = tl.load(inner_rows + k[None, :], mask=wanted[:, None], other=0.0)
        codes, places = code_rows + start // 2, outputs * (F // GROUP) + start // GROUP
        total += group_product(
            inner, codes, scales_ptr, minimums_ptr, places, some, BLOCK_K, PRODUCT
        )
    tokens = tl.load(order_ptr + rows, mask=wanted, other=0)
    out = out_ptr + tokens[:, None] * H + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=wanted[:, None] & some[None, :])


def grouped_moe(x: Tensor, logits: Tensor, weights: ExpertWeights) -> Tensor:
    """As the reference. Sums are in float32."""
    best, chosen = logits.max(dim=-1)
    (gate_up,), (down,) = weights.gate_up, weights.down
    runs = Runs.of(chosen, logits.shape[1], weights.held)
    inner = x.new_empty(len(x), down.in_features)
    out = new_outputs(x, weights)
    x = x if x.stride(-1) == 1 else x.contiguous()
    _gate_up(inner, x, best.float().sigmoid(), runs, gate_up).run()
    _down(out, inner, runs, down).run()
    return out


def _gate_up(inner: Tensor, x: Tensor, scores: Tensor, runs: Runs, weight: LinearWeight) -> Launch:
    H, F = x.shape[1], inner.shape[1]
    own = {"inner_ptr": inner, "x_ptr": x, "x_stride": x.stride(0), "scores_ptr": scores}
    return _launch("gate_up", grouped_gate_up_kernel, own | {"H": H, "F": F}, runs, x, F, weight)


def _down(out: Tensor, inner: Tensor, runs: Runs, weight: LinearWeight) -> Launch:
    F, H = inner.shape[1], out.shape[1]
    own = {"out_ptr": out, "inner_ptr": inner, "H": H, "F": F}
    return _launch("down", grouped_down_kernel, own, runs, inner, H, weight)


def _launch(
    name: str,
    kernel: Any,
    own: dict[str, Any],
    runs: Runs,
    inputs: Tensor,
    N: int,
    weight: LinearWeight,
) -> Launch:
    """`N`: outputs that the grid covers."""
    layout = weight.layout
    assert isinstance(layout, GroupLayout)
    block_m, block_n = _tile(runs.per_expert)
    kind = str(inputs.dtype).removeprefix("torch.")
    least = ", minimums" if layout.has_minimums else ""
    sizes = f"{inputs.shape[1]} to {N}, rows={block_m}, group={layout.group}{least}, {kind}"
    return Launch(
        name=f"moe_grouped_{name}[{sizes}]",
        kernel=kernel,
        grid=(triton.cdiv(N, block_n), runs.num_tiles(block_m)),
        arguments=own
        | runs.arguments()
        | {"codes_ptr": weight.data, "scales_ptr": weight.scales, "minimums_ptr": weight.minimums}
        | {"GROUP": layout.group, "PRODUCT": product_type(inputs)}
        | {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": inputs_at_once(layout.group)},
        num_warps=_num_warps(block_m, layout),
        num_stages=4 if block_m == _FEW_ROWS else 3,
        wgmma=block_m == _MANY_ROWS,
    )


def _tile(per_expert: int) -> tuple[int, int]:
    """Its rows and outputs, for so many tokens of an expert."""
    return (_MANY_ROWS, 64) if per_expert >= _MANY else (_FEW_ROWS, 32)


def _num_warps(block_m: int, layout: GroupLayout) -> int:
    """With minimums, large tiles do not fit the registers of fewer."""
    return 8 if block_m == _MANY_ROWS and layout.has_minimums else 4


def launches() -> list[Launch]:
    """What the engine launches, for the experts of the models we know."""
    found = {}
    kinds = (GroupLayout(4, 128, False, False), GroupLayout(4, 128, True, True))
    for (E, H, F), layout in zip(_KNOWN_SIZES, kinds, strict=True):
        gate_up, down = _weight(E, 2 * F, H, layout), _weight(E, H, F, layout)
        for T in (64, 64 * E):
            index = torch.empty(T, dtype=torch.int64, device="meta")
            begins = torch.empty(min(T, E) + 1, dtype=torch.int32, device="meta")
            runs, scores = Runs(index, index, begins, T // E), torch.empty(T, device="meta")
            x, inner = (torch.empty(T, w, dtype=torch.bfloat16, device="meta") for w in (H, F))
            made = (_gate_up(inner, x, scores, runs, gate_up), _down(x, inner, runs, down))
            found.update({launch.name: launch for launch in made})
    return list(found.values())


def _weight(E: int, outputs: int, inputs: int, layout: GroupLayout) -> LinearWeight:
    codes = torch.empty(E, outputs, inputs // 2, dtype=torch.uint8, device="meta")
    dtype = torch.float32 if layout.wide_scales else torch.float16
    scales = torch.empty(E, outputs, inputs // layout.group, dtype=dtype, device="meta")
    least = scales if layout.has_minimums else None
    return LinearWeight(codes, None, outputs, inputs, layout, scales, least)
