"""What the attention kernels look up: the row of a tile, blocks of keys, bits of ancestor masks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(
    tile, cu_q_ptr, num_rows, tiles_per_row, TILE_QUERIES: tl.constexpr, SEARCH: tl.constexpr
):
    """The batch row of a tile and the tile's first query within it.

    With SEARCH the tiles of row b begin at cu_q[b] // TILE_QUERIES + b. That leaves enough tiles
    for the rows before it; a row's last tile may have no queries.
    """
    if SEARCH:
        row = tile * 0 - 1
        for first in range(0, num_rows, 128):
            rows = first + tl.arange(0, 128)
            begins = tl.load(cu_q_ptr + rows, mask=rows < num_rows, other=0) // TILE_QUERIES + rows
            row += tl.sum(((rows < num_rows) & (begins <= tile)).to(tl.int32), axis=0)
        place = tile - tl.load(cu_q_ptr + row) // TILE_QUERIES - row
    else:
        row = tile // tiles_per_row
        place = tile % tiles_per_row
    return row, place * TILE_QUERIES


@triton.jit
def find_blocks(
    table_ptr,
    keys_at,
    end_key,
    prefix,
    causal,
    tree,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Blocks of cache positions, int64. The table is not read from end_key on, nor, with MASKED,
    for keys that no query of the tile sees: they may lie outside the table."""
    wanted = keys_at < end_key
    if MASKED:
        wanted &= is_seen(keys_at - prefix, causal, tree)
    blocks = tl.load(table_ptr + keys_at // BLOCK_SIZE, mask=wanted, other=0)
    return blocks.to(tl.int64)


@triton.jit
def is_seen(entries, causal, tree):
    """Whether some query of the tile sees each suffix entry; negative ones lie in the prefix."""
    return (entries < causal) | has_bit(tree, entries)


@triton.jit
def either(one, other):
    return one | other


@triton.jit
def has_bit(words, places):
    """Whether bit `places` of int64 words is set; False outside 0 .. 63."""
    half = tl.where(places < 32, words.to(tl.int32), (words >> 32).to(tl.int32))
    return (((half >> (places & 31)) & 1) != 0) & (places >= 0) & (places < 64)


@triton.jit
def bit_length(word):
    """Place of the highest set bit of an int64, plus 1; 0 for 0."""
    rest = word.to(tl.uint64, bitcast=True)
    length = (word != 0).to(tl.int32)
    for power in tl.static_range(6):
        width = 32 >> power
        upper = rest >> width
        length += tl.where(upper != 0, width, 0)
        rest = tl.where(upper != 0, upper, rest)
    return length
