"""What the attention kernels look up: the row of a tile, its queries, blocks of keys, bits of
ancestor masks."""

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
def find_blocks(table_ptr, keys_at, end_key, BLOCK_SIZE: tl.constexpr):
    """Blocks of cache positions; 0 from `end_key` on. Those of keys that no query sees may be
    anything."""
    columns = keys_at.to(tl.uint32) // BLOCK_SIZE  # unsigned, this is one instruction
    return tl.load(table_ptr + columns, mask=keys_at < end_key, other=0)


@triton.jit
def slot_of(keys_at, BLOCK_SIZE: tl.constexpr):
    """The places of cache positions in their blocks."""
    return (keys_at.to(tl.uint32) % BLOCK_SIZE).to(tl.int32)


@triton.jit
def load_queries(
    ancestors_ptr, q_ptr, start, queries, heads, wanted, q_stride_token, q_stride_head,
    D: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Ancestor masks [BLOCK_M] int64, or with ONE that of the only query, and queries [BLOCK_M, D]
    of the batch row whose first token is `start`; zeros for rows that are not wanted."""
    tokens = (start + queries).to(tl.int64)
    if ONE:
        ancestors = tl.load(ancestors_ptr + start)
    else:
        ancestors = tl.load(ancestors_ptr + tokens, mask=wanted, other=0)
    places = tokens * q_stride_token + heads * q_stride_head
    q_ptrs = q_ptr + places[:, None] + tl.arange(0, D)[None, :]
    return ancestors, tl.load(q_ptrs, mask=wanted[:, None], other=0.0)


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
    return (((half >> (places & 31)) & 1) != 0) & (places.to(tl.uint32) < 64)


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
