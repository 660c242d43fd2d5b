"""How the work of one attention call is cut into tiles and splits.

The plan depends only on shapes and host integers, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

SHORT_TILE = 64  # query rows (queries x heads of a group) per tile in decoding or drafting
LONG_TILE = 128  # query rows per tile in a prefill chunk
MAX_SPLITS = 128
MAX_PART_BYTES = 64 * 2**20  # partial results of one launch
MERGING_TILE = 16  # up to so many query rows, the last program of a tile averages its parts
MANY_PROGRAMS = 64  # tiles times KV heads, before splits
MAX_COUNTERS = 2**16  # pairs of tile and KV head that can count their programs
ENOUGH = 0.9  # share of the best fill that any number of splits gives


class Cut(NamedTuple):
    """How the keys of a kind of tile are shared between programs."""

    step_keys: int  # keys of one step of the loop
    num_warps: int
    num_stages: int  # steps whose keys are on their way, and the one that computes
    part_keys: int  # least keys of a part: with fewer, a split costs more than it saves
    places: int  # programs of a processor that are looked for


# On an H200, one row took 7.5 to 7.9 us with 300 keys and 18.0 to 18.7 with 8,192, whether with
# steps of 32, 64 or 128 keys: 64 were the fastest. With steps of 32, more programs are on a
# processor at a time: 64 rows were 8 to 22 % faster so than with 64. A processor has room for four
# of them, but for a row alone, so many parts take longer to average than they save.
_FEW = Cut(step_keys=64, num_warps=4, num_stages=4, part_keys=128, places=2)  # decode rows
_TREES = _FEW._replace(step_keys=32)  # more than MERGING_TILE query rows
_MANY = _TREES._replace(places=4)  # decode rows, at least MANY_PROGRAMS tiles times KV heads
_CHUNKS = Cut(step_keys=64, num_warps=8, num_stages=3, part_keys=128, places=1)


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
    early: bool  # reads the first blocks, and lone queries, together with the lengths
    cut: Cut


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
    fp8: bool = False  # keys and values are FP8 numbers


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
    cut = _cut(block_m, programs, crowded=shape.fp8 and most > 1)
    splits = choose_splits(
        num_programs=programs,
        places=shape.num_processors * cut.places,
        max_splits=min(
            MAX_SPLITS,
            math.ceil(shape.max_context / cut.part_keys),
            MAX_PART_BYTES // part_bytes,
        ),
    )
    search = num_tiles < shape.num_rows * per_row
    counted = num_tiles * shape.kv_heads <= MAX_COUNTERS
    return TilePlan(
        block_m=block_m,
        fewest=fewest,
        most=most,
        num_tiles=num_tiles,
        tiles_per_row=per_row,
        search=search,
        num_splits=splits,
        # Reading 16 parts more takes a round trip of 0.7 us, a second launch some 3 us; and where
        # tables have room for many parts, most contexts have few.
        merges=splits > 1 and block_m <= MERGING_TILE and counted,
        # The places where lone queries are expected must exist.
        early=block_m < LONG_TILE
        and not search
        and (most > 1 or shape.num_rows <= shape.num_tokens),
        cut=cut,
    )


def _cut(block_m: int, num_programs: int, *, crowded: bool) -> Cut:
    """`crowded`: masks of several queries and keys to convert fill the registers."""
    if block_m == LONG_TILE:
        return _CHUNKS
    if block_m > MERGING_TILE or crowded:
        return _TREES._replace(num_stages=3) if block_m == SHORT_TILE else _TREES
    return _MANY if num_programs >= MANY_PROGRAMS else _FEW


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
