"""Whether rows of logits are sound, in Triton, as `reference.are_sound`.

One program per (tile, row) says what it found; one per row takes the worst. `amax` of torch reads a
single row with one program.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.triton_functions import MINUS_INFINITY
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

TILE = 4096  # tokens of one program
# What a tile holds; the highest counts
_NOTHING: tl.constexpr = tl.constexpr(0)  # only -inf
_FINITE: tl.constexpr = tl.constexpr(1)
_UNSOUND: tl.constexpr = tl.constexpr(2)  # a NaN or +inf


@triton.jit
def _sound_tile_kernel(
    logits_ptr,  # [R, V] float32, rows logits_stride apart
    found_ptr,  # [R, tiles] int32 out
    logits_stride,
    V,
    TILE: tl.constexpr,
):
    """Grid (tiles, R)."""
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    values = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < V, other=MINUS_INFINITY)
    bad = (values != values) | (values == -MINUS_INFINITY)
    kinds = tl.where(bad, _UNSOUND, tl.where(values > MINUS_INFINITY, _FINITE, _NOTHING))
    tl.store(found_ptr + row * tl.num_programs(0) + tile, tl.max(kinds, axis=0))


@triton.jit
def _sound_row_kernel(
    found_ptr,  # [R, tiles] int32
    sound_ptr,  # [R] bool out
    num_tiles,
    TILES: tl.constexpr,  # a power of two, at least the number of tiles
):
    """Grid (R,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    found = tl.load(found_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=_NOTHING)
    tl.store(sound_ptr + row, tl.max(found, axis=0) == _FINITE)


def are_sound(logits: Tensor, tile: int = TILE) -> Tensor:
    """As the reference: logits [R, V] float32 -> [R] bool."""
    sound = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    for launch in _launches(logits, sound, tile):
        launch.run()
    return sound


def _launches(logits: Tensor, sound: Tensor, tile: int) -> Iterator[Launch]:
    R, V = logits.shape
    assert (logits.dtype, logits.stride(1)) == (torch.float32, 1)
    num_tiles = triton.cdiv(V, tile)
    found = torch.empty(R, num_tiles, dtype=torch.int32, device=logits.device)
    yield Launch(
        name=f"are_sound.tile[V={V}]",
        kernel=_sound_tile_kernel,
        grid=(num_tiles, R),
        arguments={
            "logits_ptr": logits,
            "found_ptr": found,
            "logits_stride": logits.stride(0),
            "V": V,
            "TILE": tile,
        },
        min_load_bits=WIDEST_LOAD,
    )
    yield Launch(
        name=f"are_sound.row[tiles={num_tiles}]",
        kernel=_sound_row_kernel,
        grid=(R,),
        arguments={
            "found_ptr": found,
            "sound_ptr": sound,
            "num_tiles": num_tiles,
            "TILES": triton.next_power_of_2(num_tiles),
        },
        num_warps=1,
    )


def example_launches(logits: Tensor) -> list[Launch]:
    """Launches for compile checks, over `logits` [R, V] of the meta device."""
    sound = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    return list(_launches(logits, sound, TILE))
