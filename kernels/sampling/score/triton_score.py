"""Log-probabilities of tokens, and of the best ones, in Triton, as `reference.score`.

One program per (tile of the vocabulary, row) finds the tile's best tokens and sums; one per row
joins them. NaN counts as -inf.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.settings import Scores
from kernels.sampling.triton_functions import (
    MINUS_INFINITY,
    NO_KEY,
    packed_id,
    packed_key,
    packed_value,
)
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

TILE = 2048  # tokens of one program
MAX_TOP = 64  # the most children of a node


@triton.jit
def store_sums(values, at, highest_ptr, sums_ptr):
    """Highest value of a tile without NaN, and the sum of exp(value - highest)."""
    highest = tl.max(values, axis=0)
    shift = tl.where(highest == MINUS_INFINITY, 0.0, highest)
    tl.store(highest_ptr + at, highest)
    tl.store(sums_ptr + at, tl.sum(tl.exp(values - shift), axis=0))


@triton.jit
def store_best(values, ids, at, best_ptr, count):
    """Packed keys of the best tokens of a tile, the best first."""
    keys = packed_key(values, ids)
    for place in range(count):
        best = tl.max(keys, axis=0)
        keys = tl.where(keys == best, NO_KEY, keys)
        tl.store(best_ptr + at * count + place, best)


@triton.jit
def _sums_of_tile_kernel(
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
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    values = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < V, other=MINUS_INFINITY)
    values = tl.where(values == values, values, MINUS_INFINITY)
    at = row * tl.num_programs(0) + tile
    store_sums(values, at, highest_ptr, sums_ptr)
    if best_ptr is not None:
        store_best(values, ids, at, best_ptr, num_top)


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
def _scores_of_row_kernel(
    logits_ptr,  # [R, V] float32, rows logits_stride apart
    tokens_ptr,  # [R] int64
    highest_ptr,  # what `_sums_of_tile_kernel` found
    sums_ptr,
    best_ptr,
    chosen_ptr,  # [R] float32 out
    top_ids_ptr,  # [R, num_top] int64 out
    top_ptr,  # [R, num_top] float32 out
    logits_stride,
    num_tiles,
    num_top,
    TILES: tl.constexpr,  # a power of two, at least num_tiles
    CANDIDATES: tl.constexpr,  # a power of two, at least num_tiles * num_top
):
    """Joins the tiles of one row, grid (R,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    normaliser = join_sums(highest_ptr, sums_ptr, row, num_tiles, TILES)
    chosen = logits_ptr + row * logits_stride + tl.load(tokens_ptr + row)
    tl.store(chosen_ptr + row, tl.load(chosen) - normaliser)
    if best_ptr is not None:
        at = tl.arange(0, CANDIDATES)
        count = num_tiles * num_top
        keys = tl.load(best_ptr + row * count + at, mask=at < count, other=NO_KEY)
        for place in range(num_top):
            best = tl.max(keys, axis=0)
            keys = tl.where(keys == best, NO_KEY, keys)
            tl.store(top_ids_ptr + row * num_top + place, packed_id(best).to(tl.int64))
            tl.store(top_ptr + row * num_top + place, packed_value(best) - normaliser)


def score(logits: Tensor, tokens: Tensor, num_top: int, tile: int = TILE) -> Scores:
    """As the reference: logits [S, V] float32, tokens [S] int64 -> log-probabilities."""
    assert num_top <= MAX_TOP, f"{num_top} alternatives, at most {MAX_TOP}"
    S, device = logits.shape[0], logits.device
    found = Scores(
        chosen=torch.empty(S, dtype=torch.float32, device=device),
        top_ids=torch.empty(S, num_top, dtype=torch.int64, device=device),
        top=torch.empty(S, num_top, dtype=torch.float32, device=device),
    )
    for launch in _launches(logits, tokens, found, tile):
        launch.run()
    return found


def _launches(logits: Tensor, tokens: Tensor, found: Scores, tile: int) -> list[Launch]:
    V, num_top = logits.shape[1], found.top.shape[1]
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    num_tiles = triton.cdiv(V, tile)
    shared = _new_sums(logits, num_tiles, num_top) | {
        "logits_ptr": logits,
        "logits_stride": logits.stride(0),
        "num_top": num_top,
    }
    of_tile = Launch(
        name=f"score.tile[V={V}, top={num_top}]",
        kernel=_sums_of_tile_kernel,
        grid=(num_tiles, len(logits)),
        arguments=shared | {"V": V, "TILE": tile},
        min_load_bits=WIDEST_LOAD,
    )
    return [of_tile, _row_launch(V, tokens, found, num_tiles, shared)]


def _row_launch(
    V: int, tokens: Tensor, found: Scores, num_tiles: int, shared: dict[str, Any]
) -> Launch:
    """Joins the sums of a row's tiles."""
    S, num_top = found.top.shape
    return Launch(
        name=f"score.row[V={V}, top={num_top}]",
        kernel=_scores_of_row_kernel,
        grid=(S,),
        arguments=shared
        | {
            "tokens_ptr": tokens,
            "chosen_ptr": found.chosen,
            "top_ids_ptr": found.top_ids,
            "top_ptr": found.top,
            "num_tiles": num_tiles,
            "TILES": triton.next_power_of_2(num_tiles),
            "CANDIDATES": triton.next_power_of_2(max(num_tiles * num_top, 1)),
        },
    )


def _new_sums(logits: Tensor, num_tiles: int, num_top: int) -> dict[str, Any]:
    """Buffers for the results of `_sums_of_tile_kernel`."""
    S, device = logits.shape[0], logits.device
    best = torch.empty(S, num_tiles, num_top, dtype=torch.int64, device=device)
    return {
        "highest_ptr": torch.empty(S, num_tiles, dtype=torch.float32, device=device),
        "sums_ptr": torch.empty(S, num_tiles, dtype=torch.float32, device=device),
        "best_ptr": best if num_top else None,
    }


def example_launches(logits: Tensor) -> list[Launch]:
    """Launches with and without alternatives, for compile checks, over `logits` [S, V] of the meta
    device."""

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    S, found = len(logits), []
    for num_top in (0, 20):
        top = new(S, num_top, dtype=torch.float32)
        scores = Scores(new(S, dtype=torch.float32), new(S, num_top), top)
        found += _launches(logits, new(S), scores, TILE)
    return found
