"""A mixture of experts with FP8 weights: as triton_kernel.py, with other products.

A token's input, scaled by the router, is rounded once; its inner values are rounded by row between
the two products. Weights are [E, out, in], so that both sides of a product are read along inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.triton_lookup import find_tile
from kernels.linear.scaled import FP8, ScaledLayout
from kernels.linear.triton_scaled import product_type, round_rows
from kernels.moe.triton_runs import Runs, new_outputs
from kernels.ops import ExpertWeights, LinearWeight
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

_FEW_ROWS, _MANY_ROWS = 16, 64  # of a tile
_MANY = 32  # tokens per expert from which tiles have many rows
_BLOCK_N, _BLOCK_K = 64, 128
_KNOWN_SIZES = ((128, 5120, 1024),)  # E, H, F: Maverick over 8 GPUs


@triton.jit
def scaled_gate_up_kernel(
    inner_ptr,  # [T, F] contiguous, in the order of the runs
    x_ptr,  # [T, H] contiguous, by token: FP8, or as the activations are
    x_scales_ptr,  # [T, BLOCKS] float32, by token; the router's scores if x is not rounded
    order_ptr,  # [T] int64 tokens, sorted by expert
    experts_ptr,  # [T] int64 experts, sorted
    begins_ptr,  # [runs + 1] int32
    weight_ptr,  # [E, 2F, H] FP8, contiguous, the gate first
    scales_ptr,  # [E, 2F, BLOCKS] float32, contiguous
    num_runs,
    H: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,  # inputs per scale
    BLOCKS: tl.constexpr,
    X_BLOCKS: tl.constexpr,  # scales of an input row: BLOCKS or 1
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    expert = tl.load(experts_ptr + begin)
    gate_rows = weight_ptr + (expert * (2 * F) + columns)[:, None] * H
    gate_scales = scales_ptr + (expert * (2 * F) + columns) * BLOCKS
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < H)[None, :]
        x = tl.load(
            x_ptr + tokens[:, None] * H + k[None, :], mask=wanted[:, None] & inside, other=0.0
        )
        x = x.to(PRODUCT)
        own = some[:, None] & inside
        weight = tl.load(gate_rows + k[None, :], mask=own, other=0.0).to(PRODUCT)
        gate_part = tl.dot(x, tl.trans(weight), input_precision="ieee")
        weight = tl.load(gate_rows + F * H + k[None, :], mask=own, other=0.0).to(PRODUCT)
        up_part = tl.dot(x, tl.trans(weight), input_precision="ieee")
        if BLOCKS > 1:
            block = start // BLOCK
            gate_part *= tl.load(gate_scales + block, mask=some, other=0.0)[None, :]
            up_part *= tl.load(gate_scales + F * BLOCKS + block, mask=some, other=0.0)[None, :]
            if X_BLOCKS > 1:
                places = tokens * X_BLOCKS + block
                x_scale = tl.load(x_scales_ptr + places, mask=wanted, other=0.0)[:, None]
                gate_part *= x_scale
                up_part *= x_scale
        gate += gate_part
        up += up_part
    if BLOCKS == 1:
        gate *= tl.load(gate_scales, mask=some, other=0.0)[None, :]
        up *= tl.load(gate_scales + F, mask=some, other=0.0)[None, :]
    if X_BLOCKS == 1:
        x_scale = tl.load(x_scales_ptr + tokens, mask=wanted, other=0.0)[:, None]
        gate *= x_scale
        up *= x_scale
    gated = gate / (1.0 + tl.exp(-gate)) * up
    out = inner_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :]
    tl.store(out, gated.to(inner_ptr.dtype.element_ty), mask=wanted[:, None] & some[None, :])


@triton.jit
def scaled_down_kernel(
    out_ptr,  # [T, H] contiguous, by token
    inner_ptr,  # [T, F] contiguous, in the order of the runs: FP8, or as the activations are
    inner_scales_ptr,  # [T, BLOCKS] float32, or None
    order_ptr,  # [T] int64 tokens, sorted by expert
    experts_ptr,  # [T] int64 experts, sorted
    begins_ptr,  # [runs + 1] int32
    weight_ptr,  # [E, H, F] FP8, contiguous
    scales_ptr,  # [E, H, BLOCKS] float32, contiguous
    num_runs,
    H: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
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
    expert = tl.load(experts_ptr + begin)
    weight_rows = weight_ptr + (expert * H + columns)[:, None] * F
    scales = scales_ptr + (expert * H + columns) * BLOCKS
    inner_rows = inner_ptr + rows.to(tl.int64)[:, None] * F
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, F, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < F)[None, :]
        inner = tl.load(inner_rows + k[None, :], mask=wanted[:, None] & inside, other=0.0)
        weight = tl.load(weight_rows + k[None, :], mask=some[:, None] & inside, other=0.0)
        part = tl.dot(inner.to(PRODUCT), tl.trans(weight.to(PRODUCT)), input_precision="ieee")
        if BLOCKS > 1:
            part *= tl.load(scales + start // BLOCK, mask=some, other=0.0)[None, :]
            if inner_scales_ptr is not None:
                places = rows * BLOCKS + start // BLOCK
                part *= tl.load(inner_scales_ptr + places, mask=wanted, other=0.0)[:, None]
        total += part
    if BLOCKS == 1:
        total *= tl.load(scales, mask=some, other=0.0)[None, :]
        if inner_scales_ptr is not None:
            total *= tl.load(inner_scales_ptr + rows, mask=wanted, other=0.0)[:, None]
    tokens = tl.load(order_ptr + rows, mask=wanted, other=0)
    out = out_ptr + tokens[:, None] * H + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=wanted[:, None] & some[None, :])


def scaled_moe(x: Tensor, logits: Tensor, weights: ExpertWeights) -> Tensor:
    """As the reference. Sums are in float32."""
    best, chosen = logits.max(dim=-1)
    (gate_up,), (down,) = weights.gate_up, weights.down
    first, second = _layout(gate_up), _layout(down)
    runs, scores = Runs.of(chosen, logits.shape[1], weights.held), best.float().sigmoid()
    inner = x.new_empty(len(x), down.in_features)
    out = new_outputs(x, weights)
    values, scales = x.contiguous(), scores[:, None]
    if first.rounds_inputs:
        values, scales = round_rows(x, first, scores)
    _gate_up(inner, values, scales, runs, gate_up).run()
    inner_scales = None
    if second.rounds_inputs:
        inner, inner_scales = round_rows(inner, second)
    _down(out, inner, inner_scales, runs, down).run()
    return out


def _layout(weight: LinearWeight) -> ScaledLayout:
    assert isinstance(weight.layout, ScaledLayout)
    return weight.layout


def _gate_up(inner: Tensor, x: Tensor, scales: Tensor, runs: Runs, weight: LinearWeight) -> Launch:
    F, H = inner.shape[1], x.shape[1]
    own = {"inner_ptr": inner, "x_ptr": x, "x_scales_ptr": scales, "X_BLOCKS": scales.shape[1]}
    return _launch("gate_up", scaled_gate_up_kernel, own | {"H": H, "F": F}, runs, x, F, weight)


def _down(
    out: Tensor, inner: Tensor, scales: Tensor | None, runs: Runs, weight: LinearWeight
) -> Launch:
    F, H = inner.shape[1], out.shape[1]
    own = {"out_ptr": out, "inner_ptr": inner, "inner_scales_ptr": scales, "H": H, "F": F}
    return _launch("down", scaled_down_kernel, own, runs, inner, H, weight)


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
    assert weight.scales is not None
    K, blocks = inputs.shape[1], weight.scales.shape[2]
    block_m = _MANY_ROWS if runs.per_expert >= _MANY else _FEW_ROWS
    kind = str(inputs.dtype).removeprefix("torch.")
    return Launch(
        name=f"moe_scaled_{name}[{K} to {N}, rows={block_m}, blocks={blocks}, {kind}]",
        kernel=kernel,
        grid=(triton.cdiv(N, _BLOCK_N), runs.num_tiles(block_m)),
        arguments=own
        | runs.arguments()
        | {"weight_ptr": weight.data, "scales_ptr": weight.scales}
        | {"BLOCK": _layout(weight).block, "BLOCKS": blocks, "PRODUCT": product_type(inputs)}
        | {"BLOCK_M": block_m, "BLOCK_N": _BLOCK_N, "BLOCK_K": _BLOCK_K},
        num_warps=4,
        num_stages=4 if block_m == _FEW_ROWS else 3,
        wgmma=block_m == _MANY_ROWS,
        min_load_bits=WIDEST_LOAD,
    )


def launches() -> list[Launch]:
    """What the engine launches, for the experts of the models we know."""
    found = {}
    for E, H, F in _KNOWN_SIZES:
        gate_up, down = _weight(E, 2 * F, H), _weight(E, H, F)
        for T in (64, 64 * E):
            index = torch.empty(T, dtype=torch.int64, device="meta")
            begins = torch.empty(min(T, E) + 1, dtype=torch.int32, device="meta")
            runs, scales = Runs(index, index, begins, T // E), torch.empty(T, 1, device="meta")
            x, inner = (torch.empty(T, w, dtype=FP8, device="meta") for w in (H, F))
            outs = [torch.empty(T, w, dtype=torch.bfloat16, device="meta") for w in (F, H)]
            made = (
                _gate_up(outs[0], x, scales, runs, gate_up),
                _down(outs[1], inner, scales, runs, down),
            )
            found.update({launch.name: launch for launch in made})
    return list(found.values())


def _weight(E: int, outputs: int, inputs: int) -> LinearWeight:
    data = torch.empty(E, outputs, inputs, dtype=FP8, device="meta")
    scales = torch.empty(E, outputs, 1, device="meta")
    return LinearWeight(data, None, outputs, inputs, ScaledLayout(inputs, True, None), scales)
