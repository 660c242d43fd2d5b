"""A mixture of experts for Hopper: two products over tokens that are sorted by expert.

Nothing waits for the device. Tokens of one expert are a run of the sorted order; with T tokens
there are at most min(E, T) runs, and the tiles of run r begin at begin(r) // BLOCK_M + r, which
leaves enough tiles for the runs before it. Tiles without tokens end at once. The first product
reads its rows through the order, scales them by the router's score and applies the activation; the
second one writes its rows back through the order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.triton_lookup import find_tile
from kernels.linear.scaled import ScaledLayout
from kernels.moe import triton_groups, triton_scaled
from kernels.moe.triton_runs import Runs, new_outputs
from kernels.ops import ExpertWeights, LinearWeight
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

_FEW_ROWS, _MANY_ROWS = 16, 64  # of a tile
_MANY = 32  # tokens per expert from which tiles have many rows
_BLOCK_N = 64
_KNOWN_SIZES = ((16, 5120, 1024), (128, 5120, 1024))  # E, H, F: Scout, Maverick over 8 GPUs


@triton.jit
def gate_up_kernel(
    inner_ptr,  # [T, F] contiguous, in the order of the runs
    x_ptr,  # [T, H], rows x_stride apart
    scores_ptr,  # [T] float32, by token
    order_ptr,  # [T] int64 tokens, sorted by expert
    experts_ptr,  # [T] int64 experts, sorted
    begins_ptr,  # [runs + 1] int32
    weight_ptr,  # [E, H, 2F] contiguous, the gate first
    num_runs,
    x_stride,
    H: tl.constexpr,
    F: tl.constexpr,
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
    scores = tl.load(scores_ptr + tokens, mask=wanted, other=0.0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_ptr += tl.load(experts_ptr + begin) * (2 * H * F)
    x_rows = x_ptr + tokens[:, None] * x_stride
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=wanted[:, None] & (k < H)[None, :], other=0.0)
        x = (x.to(tl.float32) * scores[:, None]).to(x.dtype).to(PRODUCT)
        weights = weight_ptr + k[:, None] * (2 * F) + columns[None, :]
        inside = (k < H)[:, None] & (columns < F)[None, :]
        gate_part = tl.load(weights, mask=inside, other=0.0).to(PRODUCT)
        gate = tl.dot(x, gate_part, acc=gate, input_precision="ieee")
        up_part = tl.load(weights + F, mask=inside, other=0.0).to(PRODUCT)
        up = tl.dot(x, up_part, acc=up, input_precision="ieee")
    gated = gate / (1.0 + tl.exp(-gate)) * up
    out = inner_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :]
    inside = wanted[:, None] & (columns < F)[None, :]
    tl.store(out, gated.to(inner_ptr.dtype.element_ty), mask=inside)


@triton.jit
def down_kernel(
    out_ptr,  # [T, H] contiguous, by token
    inner_ptr,  # [T, F] contiguous, in the order of the runs
    order_ptr,  # [T] int64 tokens, sorted by expert
    experts_ptr,  # [T] int64 experts, sorted
    begins_ptr,  # [runs + 1] int32
    weight_ptr,  # [E, F, H] contiguous
    num_runs,
    H: tl.constexpr,
    F: tl.constexpr,
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
    weight_ptr += tl.load(experts_ptr + begin) * (F * H)
    inner_rows = inner_ptr + rows.to(tl.int64)[:, None] * F
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, F, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inner = tl.load(inner_rows + k[None, :], mask=wanted[:, None] & (k < F)[None, :], other=0.0)
        weights = weight_ptr + k[:, None] * H + columns[None, :]
        inside = (k < F)[:, None] & (columns < H)[None, :]
        part = tl.load(weights, mask=inside, other=0.0).to(PRODUCT)
        total = tl.dot(inner.to(PRODUCT), part, acc=total, input_precision="ieee")
    tokens = tl.load(order_ptr + rows, mask=wanted, other=0)
    out = out_ptr + tokens[:, None] * H + columns[None, :]
    inside = wanted[:, None] & (columns < H)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def moe(x: Tensor, logits: Tensor, weights: ExpertWeights) -> Tensor:
    """As the reference. Sums are in float32."""
    layout = weights.gate_up[0].layout
    if isinstance(layout, ScaledLayout):
        return triton_scaled.scaled_moe(x, logits, weights)
    if layout is not None:
        return triton_groups.grouped_moe(x, logits, weights)
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
    assert weight.data.is_contiguous()
    assert weight.data.shape[1:] == (H, 2 * F)
    own = {"inner_ptr": inner, "x_ptr": x, "scores_ptr": scores, "weight_ptr": weight.data}
    own |= {"x_stride": x.stride(0), "H": H, "F": F}
    return _launch("gate_up", gate_up_kernel, own, runs, x, (F, H))


def _down(out: Tensor, inner: Tensor, runs: Runs, weight: LinearWeight) -> Launch:
    F, H = inner.shape[1], out.shape[1]
    assert weight.data.is_contiguous()
    assert weight.data.shape[1:] == (F, H)
    own = {"out_ptr": out, "inner_ptr": inner, "weight_ptr": weight.data, "H": H, "F": F}
    return _launch("down", down_kernel, own, runs, inner, (H, F))


def _launch(
    name: str,
    kernel: Any,
    own: dict[str, Any],
    runs: Runs,
    inputs: Tensor,
    sizes: tuple[int, int],
) -> Launch:
    """`sizes`: outputs and inputs of the product."""
    N, K = sizes
    block_m = _MANY_ROWS if runs.per_expert >= _MANY else _FEW_ROWS
    dtype = str(inputs.dtype).removeprefix("torch.")
    return Launch(
        name=f"moe_{name}[{K} to {N}, rows={block_m}, {dtype}]",
        kernel=kernel,
        grid=(triton.cdiv(N, _BLOCK_N), runs.num_tiles(block_m)),
        arguments=own | runs.arguments() | _constants(block_m, inputs),
        num_warps=4,
        num_stages=3,
        wgmma=block_m == _MANY_ROWS,
        min_load_bits=WIDEST_LOAD,
    )


def _constants(block_m: int, inputs: Tensor) -> dict[str, Any]:
    # The interpreter cannot multiply bfloat16.
    exact = inputs.dtype == torch.float32 or inputs.device.type == "cpu"
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_K": 64 if block_m == _MANY_ROWS else 128,
        "PRODUCT": tl.float32 if exact else tl.bfloat16,
    }


def launches() -> list[Launch]:
    """What the engine launches, for the experts of the models we know."""
    found = {}
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    for E, H, F in _KNOWN_SIZES:
        gate_up = LinearWeight(torch.empty(E, H, 2 * F, **meta), None, 2 * F, H)
        down = LinearWeight(torch.empty(E, F, H, **meta), None, H, F)
        for T in (64, 64 * E):
            index = torch.empty(T, dtype=torch.int64, device="meta")
            begins = torch.empty(min(T, E) + 1, dtype=torch.int32, device="meta")
            runs, scores = Runs(index, index, begins, T // E), torch.empty(T, device="meta")
            x, inner = torch.empty(T, H, **meta), torch.empty(T, F, **meta)
            made = (_gate_up(inner, x, scores, runs, gate_up), _down(x, inner, runs, down))
            found.update({launch.name: launch for launch in made})
    return [*found.values(), *triton_scaled.launches(), *triton_groups.launches()]
