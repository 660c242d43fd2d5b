"""Log-sum-exp of rows, and their best tokens, in Triton: what a model believed before any edit."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.triton_draw import MINUS_INFINITY, NO_KEY, packed_key
from kernels.triton_launch import WIDEST_LOAD, Launch


@triton.jit
def sums_of_tile_kernel(
    logits_ptr,  # [R, V] float32, rows logits_stride apart
    highest_ptr,  # [R, tiles] float32 out: highest logit of each tile
    sums_ptr,  # [R, tiles] float32 out: sum of exp(logit - highest)
    best_ptr,  # [R, tiles, num_top] int64 out: packed keys of the best tokens; None: not wanted
    logits_stride,
    V,
    num_top,
    TILE: tl.constexpr,
):
    """One tile of one row, grid (tiles, R)."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    values = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < V, other=MINUS_INFINITY)
    values = tl.where(values == values, values, MINUS_INFINITY)
    highest = tl.max(values, axis=0)
    shift = tl.where(highest == MINUS_INFINITY, 0.0, highest)
    at = row * tl.num_programs(0) + tile
    tl.store(highest_ptr + at, highest)
    tl.store(sums_ptr + at, tl.sum(tl.exp(values - shift), axis=0))
    if best_ptr is not None:
        keys = packed_key(values, ids)
        for place in range(num_top):
            best = tl.max(keys, axis=0)
            keys = tl.where(keys == best, NO_KEY, keys)
            tl.store(best_ptr + at * num_top + place, best)


@triton.jit
def join_sums(highest_ptr, sums_ptr, row, num_tiles, TILES: tl.constexpr):
    """log(sum(exp(row))) from its tiles."""
    tiles = tl.arange(0, TILES)
    inside = tiles < num_tiles
    at = row * num_tiles + tiles
    highest = tl.load(highest_ptr + at, mask=inside, other=MINUS_INFINITY)
    sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
    top = tl.max(highest, axis=0)
    shift = tl.where(top == MINUS_INFINITY, 0.0, top)
    return top + tl.log(tl.sum(sums * tl.exp(highest - shift), axis=0))


@triton.jit
def _logsumexp_of_row_kernel(
    highest_ptr,  # [R, num_tiles] float32
    sums_ptr,  # [R, num_tiles] float32
    out_ptr,  # [R] float32 out, out_stride apart
    out_stride,
    num_tiles,
    TILES: tl.constexpr,  # a power of two, at least num_tiles
):
    """Joins the tiles of one row, grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    total = join_sums(highest_ptr, sums_ptr, row, num_tiles, TILES)
    tl.store(out_ptr + row * out_stride, total)


def sums_launch(logits: Tensor, sums: dict[str, Any], tile: int, num_top: int) -> Launch:
    """The pass over raw logits; `sums` holds the tensors that `new_sums` made."""
    R, V = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    return Launch(
        name=f"logsumexp.tile[V={V}, top={num_top}]",
        kernel=sums_of_tile_kernel,
        grid=(triton.cdiv(V, tile), R),
        arguments={
            "logits_ptr": logits,
            **sums,
            "logits_stride": logits.stride(0),
            "V": V,
            "num_top": num_top,
            "TILE": tile,
        },
        min_load_bits=WIDEST_LOAD,
    )


def new_sums(logits: Tensor, tile: int, num_top: int) -> dict[str, Any]:
    """Room for what `sums_of_tile_kernel` finds of the best `num_top` tokens and of all."""
    shape = (logits.shape[0], triton.cdiv(logits.shape[1], tile))
    best = (
        torch.empty(*shape, num_top, dtype=torch.int64, device=logits.device) if num_top else None
    )
    return {
        "highest_ptr": torch.empty(shape, dtype=torch.float32, device=logits.device),
        "sums_ptr": torch.empty(shape, dtype=torch.float32, device=logits.device),
        "best_ptr": best,
    }


def logsumexp_launches(logits: Tensor, out: Tensor, tile: int) -> list[Launch]:
    """log(sum(exp(logits))) [R, V] -> `out` [R]."""
    R, V = logits.shape
    sums = new_sums(logits, tile, 0)
    num_tiles = triton.cdiv(V, tile)
    of_row = Launch(
        name=f"logsumexp.row[V={V}]",
        kernel=_logsumexp_of_row_kernel,
        grid=(R,),
        arguments={
            "highest_ptr": sums["highest_ptr"],
            "sums_ptr": sums["sums_ptr"],
            "out_ptr": out,
            "out_stride": out.stride(0),
            "num_tiles": num_tiles,
            "TILES": triton.next_power_of_2(num_tiles),
        },
    )
    return [sums_launch(logits, sums, tile, 0), of_row]
