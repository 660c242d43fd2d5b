"""How the work of one attention call is cut into tiles and splits.

The plan depends only on shapes and host integers, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

SHORT_TILE = 64  # query rows (queries x heads of a group) per tile in decoding or drafting
LONG_TILE = 128  # query rows per tile in a prefill chunk
MIN_SPLIT_KEYS = 128  # with fewer keys a split costs more than it saves
MAX_SPLITS = 128
MAX_PART_BYTES = 64 * 2**20  # partial results of one launch
MAX_MERGED_SPLITS = 32  # that one program averages
MERGING_TILE = 16  # up to so many query rows, the last program of a tile averages its parts
MANY_PROGRAMS = 64  # tiles times KV heads, before splits
MAX_COUNTERS = 2**16  # pairs of tile and KV head that can count their programs
ENOUGH = 0.9  # share of the best fill that any number of splits gives


@dataclass(frozen=True, slots=True)
class TilePlan:
    """One launch of `attend_splits` over the batch rows of `fewest` .. `most` queries."""

    block_m: int
    fewest: int
    most: int
    num_tiles: int
    tiles_per_row: int  # ignored with `search`
    search: bool
    num_splits: int
    merges: bool  # the programs average the parts themselves

    @property
    def num_warps(self) -> int:
        return 8 if self.block_m == LONG_TILE else 4

    @property
    def block_n(self) -> int:
        """Keys of one step. With 32, more programs of decode rows are on a processor at a time: on
        an H200, 64 rows were 8 to 22 % faster than with 64, and one row 9 to 13 %."""
        return 64 if self.block_m == LONG_TILE else 32


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan depends on."""

    num_tokens: int
    num_rows: int
    max_q: int
    max_context: int
    group: int  # query heads of one KV head
    kv_heads: int
    head_dim: int
    num_processors: int  # streaming multiprocessors


@functools.lru_cache(maxsize=256)  # every layer of a step asks for the same plan
def plan_tiles(shape: Shape) -> tuple[TilePlan, ...]:
    """One launch if all rows fit a short tile or have equally many queries; else one for the rows
    that fit a short tile and one for the others."""
    rows = shape.max_q * shape.group
    if rows <= SHORT_TILE:
        block_m = max(16, 1 << (rows - 1).bit_length())
        return (_plan(shape, block_m, 0, shape.max_q),)
    if shape.num_tokens == shape.num_rows * shape.max_q:  # equally many queries
        return (_plan(shape, LONG_TILE, 0, shape.max_q),)
    short = SHORT_TILE // shape.group
    return (
        _plan(shape, SHORT_TILE, 0, short),
        _plan(shape, LONG_TILE, short + 1, shape.max_q),
    )


def _plan(shape: Shape, block_m: int, fewest: int, most: int) -> TilePlan:
    queries = block_m // shape.group  # of one tile
    per_row = math.ceil(most / queries)
    searched = shape.num_tokens // queries + shape.num_rows  # tiles, see find_tile
    num_tiles = min(shape.num_rows * per_row, searched)
    busy = min(num_tiles, math.ceil(shape.num_tokens / queries)) if fewest else num_tiles
    part_bytes = max(4 * num_tiles * shape.kv_heads * block_m * shape.head_dim, 1)
    programs = busy * shape.kv_heads
    splits = choose_splits(
        num_programs=programs,
        places=shape.num_processors * _places_of_processor(block_m, programs),
        max_splits=min(
            MAX_SPLITS,
            math.ceil(shape.max_context / MIN_SPLIT_KEYS),
            MAX_PART_BYTES // part_bytes,
        ),
    )
    search = num_tiles < shape.num_rows * per_row
    counted = num_tiles * shape.kv_heads <= MAX_COUNTERS
    merges = 1 < splits <= MAX_MERGED_SPLITS and block_m <= MERGING_TILE and counted
    return TilePlan(block_m, fewest, most, num_tiles, per_row, search, splits, merges)


def _places_of_processor(block_m: int, num_programs: int) -> int:
    """How many programs of a processor are looked for. It has room for four of the smallest, but
    for a row alone, so many parts would take longer to average than they save."""
    if block_m == LONG_TILE:
        return 1
    return 4 if block_m <= MERGING_TILE and num_programs >= MANY_PROGRAMS else 2


def choose_splits(num_programs: int, places: int, max_splits: int) -> int:
    """How many programs share the keys of one tile and KV head.

    `num_programs * splits` programs run in waves of `places` at a time, and the last wave may be
    nearly empty. The result is the fewest splits, from 1 to `max_splits`, whose waves are at
    least 0.9 times as full as the fullest.
    """
    candidates = range(1, max(max_splits, 1) + 1)
    fills = [_fill(num_programs * splits, places) for splits in candidates]
    return next(n for n, fill in zip(candidates, fills, strict=True) if fill >= ENOUGH * max(fills))


def _fill(num_programs: int, places: int) -> float:
    """The share of all places of all waves that programs fill."""
    waves = max(math.ceil(num_programs / places), 1)
    return num_programs / (waves * places)
