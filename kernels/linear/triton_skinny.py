"""Products of few rows with plain weights on CUDA devices. Reading the weight takes their time.

The weight is cut into pieces of BLOCK_N outputs by BLOCK_K inputs. Each program takes an equal run
of pieces, tile after tile of outputs, so that all processors read until the end. A run may begin or
end in the middle of a tile. Then each program of the tile stores its float32 sums, and the last one
to do so adds all of them in the order of the programs. So there is no second launch, and the result
does not depend on which program is the last.

The rows are always padded to 16. So a row's result depends on nothing but the row, the weight and
the plan: alone or among others, its bits are the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.triton_scaled import product_type
from kernels.ops import LinearWeight
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

MOST_ROWS = 16
_MAX_TILES = 8192  # of outputs, of one weight
_PROCESSORS = 132  # of an H100


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut."""

    block_n: int  # weight rows of a piece
    block_k: int  # inputs of a piece
    num_stages: int  # pieces that a program has in flight
    programs: int  # on each processor
    num_warps: int = 4

    @property
    def name(self) -> str:
        return (
            f"{self.block_n}x{self.block_k}, {self.num_stages} stages, {self.programs} programs, "
            f"{self.num_warps} warps"
        )


# Those worth measuring on Hopper. The programs of a processor share its 228 KB of shared memory, of
# which a piece takes 2 block_k (block_n + 16) bytes.
PLANS = (
    Plan(64, 128, 5, 2),
    Plan(64, 256, 5, 1),
    Plan(128, 128, 6, 1, 8),
    Plan(128, 128, 5, 1),
    Plan(128, 64, 5, 2),
    Plan(64, 64, 5, 4),
)


@triton.jit(do_not_specialize=["T"])
def skinny_linear_kernel(
    out_ptr,  # [T, N], contiguous
    x_ptr,  # [T, K], rows x_stride apart
    weight_ptr,  # [N, K], contiguous; with GATED [2 N, K], the gate first
    bias_ptr,  # [N] float32, or None; with GATED [2 N]
    parts_ptr,  # [programs, 2, BLOCK_N, BLOCK_T] float32: sums of a program's first and last tile
    counters_ptr,  # [tiles] int32, zero before and after
    T,
    N,
    K,
    x_stride,
    GATED: tl.constexpr,  # the result is silu(gate) * up; half of a tile's outputs are the gate's
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRODUCT: tl.constexpr,  # input type of the matrix products
):
    """A run of pieces. Grid (programs,), at most as many as pieces."""
    await_inputs()
    program, steps = tl.program_id(0), tl.cdiv(K, BLOCK_K)  # steps: pieces of a tile
    pieces = tl.cdiv(N, BLOCK_N // 2 if GATED else BLOCK_N) * steps
    begin, end = _first_piece(program, pieces), _first_piece(program + 1, pieces)
    rows, inputs = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    for piece in range(begin, end):
        tile, step = piece // steps, piece % steps
        outputs, exist = _outputs(tile, N, GATED, BLOCK_N)
        k = step * BLOCK_K + inputs
        x = tl.load(
            x_ptr + rows[None, :] * x_stride + k[:, None],
            mask=(rows < T)[None, :] & (k < K)[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_T]
        weight = tl.load(
            weight_ptr + outputs.to(tl.int64)[:, None] * K + k[None, :],
            mask=exist[:, None] & (k < K)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total = tl.dot(weight.to(PRODUCT), x.to(PRODUCT), total, input_precision="ieee")
        if (step == steps - 1) | (piece == end - 1):
            if (tile * steps >= begin) & ((tile + 1) * steps <= end):
                _write(out_ptr, bias_ptr, total, tile, T, N, GATED, BLOCK_T, BLOCK_N)
            else:
                tl.store(_part(parts_ptr, program, tile, pieces, steps, BLOCK_T, BLOCK_N), total)
            total = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    # After the loop, because Triton loads ahead only in loops that have no loop inside
    tl.debug_barrier()  # all threads have stored before one says so
    first_tile, last_tile = begin // steps, (end - 1) // steps
    if (first_tile * steps < begin) | ((first_tile + 1) * steps > end):
        _add_up(
            out_ptr, bias_ptr, parts_ptr, counters_ptr, first_tile, pieces, steps,
            T, N, GATED, BLOCK_T, BLOCK_N,
        )  # fmt: skip
    if (last_tile > first_tile) & ((last_tile + 1) * steps > end):
        _add_up(
            out_ptr, bias_ptr, parts_ptr, counters_ptr, last_tile, pieces, steps,
            T, N, GATED, BLOCK_T, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _first_piece(program, pieces):
    """Of a program's run."""
    return (tl.cast(program, tl.int64) * pieces // tl.num_programs(0)).to(tl.int32)


@triton.jit
def _program_of(piece, pieces):
    """The program in whose run a piece is."""
    return ((tl.cast(piece + 1, tl.int64) * tl.num_programs(0) - 1) // pieces).to(tl.int32)


@triton.jit
def _outputs(tile, N, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The weight's rows of a tile, and which of them exist."""
    places = tl.arange(0, BLOCK_N)
    if GATED:
        columns = tile * (BLOCK_N // 2) + places % (BLOCK_N // 2)
        outputs = columns + places // (BLOCK_N // 2) * N
    else:
        columns = tile * BLOCK_N + places
        outputs = columns
    return outputs, columns < N


@triton.jit
def _part(parts_ptr, program, tile, pieces, steps, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a program stores its sums of a tile that others compute, too."""
    is_later = tile != _first_piece(program, pieces) // steps
    places = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    return parts_ptr + (program * 2 + is_later.to(tl.int32)) * (BLOCK_N * BLOCK_T) + places


@triton.jit
def _add_up(
    out_ptr, bias_ptr, parts_ptr, counters_ptr, tile, pieces, steps,
    T, N, GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Count one program's stored sums of a tile. The last one writes the results."""
    first = _program_of(tile * steps, pieces)
    last = _program_of(tile * steps + steps - 1, pieces)
    if tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") == last - first:
        total = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
        for program in range(first, last + 1):
            part = _part(parts_ptr, program, tile, pieces, steps, BLOCK_T, BLOCK_N)
            total += tl.load(part, cache_modifier=".cg")
        _write(out_ptr, bias_ptr, total, tile, T, N, GATED, BLOCK_T, BLOCK_N)
        tl.store(counters_ptr + tile, 0)  # for the next launch


@triton.jit
def _write(
    out_ptr, bias_ptr, total, tile,
    T, N, GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The results of a tile from its whole sums."""
    if bias_ptr is not None:
        outputs, exist = _outputs(tile, N, GATED, BLOCK_N)
        total += tl.load(bias_ptr + outputs, mask=exist, other=0.0)[:, None]
    if GATED:
        halves = tl.permute(tl.reshape(total, [2, BLOCK_N // 2, BLOCK_T]), [1, 2, 0])
        gate, up = tl.split(halves)
        _write_columns(out_ptr, gate / (1.0 + tl.exp(-gate)) * up, tile, T, N)
    else:
        _write_columns(out_ptr, total, tile, T, N)


@triton.jit
def _write_columns(out_ptr, results, tile, T, N):
    columns = tile * results.shape[0] + tl.arange(0, results.shape[0])
    rows = tl.arange(0, results.shape[1])
    places = out_ptr + rows.to(tl.int64)[None, :] * N + columns[:, None]
    inside = (columns < N)[:, None] & (rows < T)[None, :]
    tl.store(places, results.to(out_ptr.dtype.element_ty), mask=inside)


def linear_few(x: Tensor, weight: LinearWeight, plan: Plan) -> Tensor:
    """x [T, K] of at most MOST_ROWS rows -> [T, N] in x's dtype."""
    return _run(x, weight, plan, gated=False)


def gated_linear_few(x: Tensor, weight: LinearWeight, plan: Plan) -> Tensor:
    """silu(gate) * up of a product whose first half of outputs is the gate: x [T, K] of at most
    MOST_ROWS rows -> [T, N / 2] in x's dtype. Only the result is rounded."""
    return _run(x, weight, plan, gated=True)


def _run(x: Tensor, weight: LinearWeight, plan: Plan, *, gated: bool) -> Tensor:
    assert len(x) <= MOST_ROWS, f"{len(x)} rows"
    assert x.dtype == weight.data.dtype, f"{x.dtype} activations, {weight.data.dtype} weights"
    num_outputs = weight.out_features // (2 if gated else 1)
    out = torch.empty(len(x), num_outputs, dtype=x.dtype, device=x.device)
    launch(out, x if x.stride(-1) == 1 else x.contiguous(), weight, plan, gated=gated).run()
    return out


def launch(out: Tensor, x: Tensor, weight: LinearWeight, plan: Plan, *, gated: bool) -> Launch:
    """The kernel's launch; also what is compiled before products are measured."""
    (T, K), N = x.shape, out.shape[1]
    tiles = triton.cdiv(N, plan.block_n // 2 if gated else plan.block_n)
    assert tiles <= _MAX_TILES, f"{N} outputs are too many"
    programs = min(tiles * triton.cdiv(K, plan.block_k), plan.programs * _processors(x.device))
    kind = str(x.dtype).removeprefix("torch.")
    return Launch(
        name=f"{'gated' if gated else 'skinny'}_linear[{plan.name}, {kind}]",
        kernel=skinny_linear_kernel,
        grid=(programs if T else 0,),
        arguments={
            "out_ptr": out,
            "x_ptr": x,
            "weight_ptr": weight.data,
            "bias_ptr": weight.bias,
            "parts_ptr": torch.empty(programs, 2, plan.block_n, MOST_ROWS, device=x.device),
            "counters_ptr": _counters(x.device),
            "T": T,
            "N": N,
            "K": K,
            "x_stride": x.stride(0),
            "GATED": gated,
            "BLOCK_T": MOST_ROWS,
            "BLOCK_N": plan.block_n,
            "BLOCK_K": plan.block_k,
            "PRODUCT": product_type(x),
        },
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        wgmma=True,
        min_load_bits=WIDEST_LOAD,
    )


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that every launch leaves as zeros. Launches on a device come one after the other. The
    first call is not in a graph's capture, because steps run before they are captured."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


@functools.cache
def _processors(device: torch.device) -> int:
    """Those of an H100, if the device is none."""
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def launches() -> list[Launch]:
    """What can be chosen for the models we know."""
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    (K, F), found = (4096, 14336), []
    weight = LinearWeight(torch.empty(2 * F, K, **meta), None, 2 * F, K)
    x = torch.empty(MOST_ROWS, K, **meta)
    for gated in (False, True):
        out = torch.empty(MOST_ROWS, F if gated else 2 * F, **meta)
        found += [launch(out, x, weight, plan, gated=gated) for plan in PLANS]
    return found
