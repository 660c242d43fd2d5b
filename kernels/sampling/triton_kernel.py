"""Draws and arg-max of logits in Triton.

A row is cut into tiles of the vocabulary, one program each, so that even a single row keeps the
GPU busy; a second kernel joins the results of a row's tiles. The cut depends only on the
vocabulary, so a row's result does not depend on other rows. NaN counts as -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import triton_sound
from kernels.sampling.draw import triton_draw
from kernels.sampling.edit import triton_edit
from kernels.sampling.rank import triton_noisy, triton_rank
from kernels.sampling.score import triton_score
from kernels.sampling.triton_functions import (
    MINUS_INFINITY,
    NO_TOKEN,
    best_noisy,
    best_of_tiles,
    best_plain,
)
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

TILE = 2048  # tokens of one program
_EXAMPLE_VOCABULARY = 202048  # Llama 4, the largest


@triton.jit
def _best_of_tile_kernel(
    logits_ptr,  # [R, V] float32, rows logits_stride apart
    keys_ptr,  # [R] int64 noise keys; None: no noise
    scores_ptr,  # [R, tiles] float32 out: the best of each tile
    tokens_ptr,  # [R, tiles] int32 out: its id
    logits_stride,
    V,
    TILE: tl.constexpr,
):
    """The best token of one tile of one row, grid (tiles, R)."""
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tile * TILE
    ids = first + tl.arange(0, TILE)
    values = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < V, other=MINUS_INFINITY)
    values = tl.where(values == values, values, MINUS_INFINITY)
    if keys_ptr is None:
        score, token = best_plain(values, first)
    else:
        key = tl.load(keys_ptr + row).to(tl.uint64)
        score, token, _ = best_noisy(values, ids, first, key)
    at = row * tl.num_programs(0) + tile
    tl.store(scores_ptr + at, score)
    tl.store(tokens_ptr + at, token)


@triton.jit
def _best_of_row_kernel(
    scores_ptr,  # [R, num_tiles] float32
    tokens_ptr,  # [R, num_tiles] int32
    out_ptr,  # [R] int64 out
    num_tiles,
    TILES: tl.constexpr,  # a power of two, at least num_tiles
):
    """The best of a row's tiles, grid (R,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    inside = tiles < num_tiles
    at = row * num_tiles + tiles
    scores = tl.load(scores_ptr + at, mask=inside, other=MINUS_INFINITY)
    tokens = tl.load(tokens_ptr + at, mask=inside, other=NO_TOKEN)
    _, token = best_of_tiles(scores, tokens)
    tl.store(out_ptr + row, token.to(tl.int64))


def gumbel_argmax(logits: Tensor, keys: Tensor, tile: int = TILE) -> Tensor:
    """As the reference: logits [R, V] float32, keys [R] int64 -> [R] int64 drawn tokens."""
    return _best(logits, keys, tile)


def argmax(logits: Tensor, tile: int = TILE) -> Tensor:
    """As the reference: [R, V] float32 -> [R] int64, the lowest token id among equals."""
    return _best(logits, None, tile)


def _best(logits: Tensor, keys: Tensor | None, tile: int) -> Tensor:
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    for launch in _best_launches(logits, keys, out, tile):
        launch.run()
    return out


def _best_launches(logits: Tensor, keys: Tensor | None, out: Tensor, tile: int) -> list[Launch]:
    R, V = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    num_tiles = triton.cdiv(V, tile)
    best = {
        "scores_ptr": torch.empty(R, num_tiles, dtype=torch.float32, device=logits.device),
        "tokens_ptr": torch.empty(R, num_tiles, dtype=torch.int32, device=logits.device),
    }
    given = {"logits_ptr": logits, "keys_ptr": keys, "logits_stride": logits.stride(0)}
    name = "argmax" if keys is None else "gumbel_argmax"
    of_tile = Launch(
        name=f"{name}.tile[V={V}]",
        kernel=_best_of_tile_kernel,
        grid=(num_tiles, R),
        arguments=given | best | {"V": V, "TILE": tile},
        min_load_bits=WIDEST_LOAD,
    )
    tiles = {"num_tiles": num_tiles, "TILES": triton.next_power_of_2(num_tiles)}
    of_row = Launch(
        name=f"argmax.row[V={V}]",
        kernel=_best_of_row_kernel,
        grid=(R,),
        arguments=best | {"out_ptr": out} | tiles,
    )
    return [of_tile, of_row]


def launches() -> list[Launch]:
    """What the engine launches. The vocabulary size is no compile-time constant; only its number of
    tiles is, rounded up to a power of two. So one vocabulary stands for all."""
    logits = torch.empty(64, _EXAMPLE_VOCABULARY, dtype=torch.float32, device="meta")
    keys = torch.empty(64, dtype=torch.int64, device="meta")
    return [
        *_best_launches(logits, keys, keys, TILE),
        *_best_launches(logits, None, keys, TILE)[:1],
        *triton_edit.example_launches(logits),
        *triton_noisy.example_launches(logits),
        *triton_draw.example_launches(logits),
        *triton_rank.example_launches(logits.device),
        *triton_score.example_launches(logits),
        *triton_sound.example_launches(logits),
    ]
