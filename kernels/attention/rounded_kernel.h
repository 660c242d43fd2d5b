// Attention with queries and softmax weights rounded to bfloat16, for bfloat16 caches.
//
// The sums of one query run over dimensions in blocks of 32 and over keys in blocks of 32 from the
// span's beginning, so its result does not depend on other queries in the tile. A score does not
// depend on the place of its key, so the paths of a tree share all scores. The order of values
// within a block matters, so blocks that reach beyond the prefix are packed again for each path.
//
// `Products` multiplies, with sums in float32: TileProducts (amx_kernel.h) or DotProducts
// (dot_kernel.h). A tile holds 16 rows of 32 inputs, or the weights of 32 inputs and 16 outputs as
// in a panel of linear/panels.h. Between begin() and end() it has, for at most sixteen rows:
//
//   multiply_keys(queries, rows, keys, num_groups, num_chunks, scores): scores[rows][16 num_groups]
//     = queries x keys, rows kMaxColumns apart. `queries`: num_chunks tiles of 32 dimensions;
//     `keys`: num_groups x num_chunks tiles.
//   multiply_values(weights, rows, values, num_blocks, per_block, add, out): out[rows][32] =
//     weights x values, or that added to `out`. `weights`: [rows][32 num_blocks], rows kSpan apart;
//     `values`: for each block of 32 keys `per_block` tiles, of which two are used.
#pragma once

#include "../linear/amx_kernel.h"
#include "../linear/dot_kernel.h"
#include "problem.h"

namespace aerie {

#if AERIE_HAS_AMX || AERIE_HAS_DOTS

constexpr int64_t kTileElements = kTileRows * kTileK;  // bfloat16 numbers

// One stage of Eklundh's transposition: swap the off-diagonal blocks of Size lanes.
template <int Size, size_t... Lane>
AERIE_INLINE void exchange(UVec& a, UVec& b, std::index_sequence<Lane...>) {
  const UVec upper = __builtin_shufflevector(
      a, b, ((int(Lane) & Size) ? 16 + int(Lane) - Size : int(Lane))...);
  const UVec lower = __builtin_shufflevector(
      a, b, ((int(Lane) & Size) ? 16 + int(Lane) : int(Lane) + Size)...);
  a = upper;
  b = lower;
}

template <int Size>
AERIE_INLINE void exchange_all(UVec (&rows)[16]) {
  AERIE_UNROLL for (int i = 0; i < 16; ++i)
    if ((i & Size) == 0) exchange<Size>(rows[i], rows[i + Size], std::make_index_sequence<16>{});
}

// Sixteen keys x 32 dimensions, as a tile of weights: line p holds dimensions 2p, 2p + 1 of all
// keys. Keys that no query sees are zero.
inline void pack_keys(const uint16_t* const (&keys)[16], int64_t d, uint16_t* tile) {
  UVec rows[16];
  AERIE_UNROLL for (int k = 0; k < 16; ++k)
    rows[k] = keys[k] ? load_pairs(keys[k] + d).part[0] : UVec{};
  exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
  AERIE_UNROLL for (int p = 0; p < 16; ++p)
    *reinterpret_cast<UVecInMemory*>(tile + p * 32) = rows[p];
}

typedef uint16_t HalfLine __attribute__((vector_size(64)));  // 32 bfloat16 numbers
typedef uint16_t HalfLineInMemory __attribute__((vector_size(64), aligned(2), may_alias));

// Alternately a number of `a` and one of `b`, from number First of both on.
template <int First, size_t... Lane>
AERIE_INLINE HalfLine interleave(HalfLine a, HalfLine b, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(a, b, (First + int(Lane) / 2 + int(Lane) % 2 * 32)...);
}

// 32 values x 32 dimensions, as two tiles of weights of sixteen dimensions each: line p holds values
// 2p, 2p + 1. Values that no query sees are zero.
inline void pack_values(const uint16_t* const* values, int64_t d, uint16_t* tiles) {
  constexpr auto lanes = std::make_index_sequence<32>{};
  const auto number = [&](int k) {
    return values[k] ? (HalfLine) *reinterpret_cast<const HalfLineInMemory*>(values[k] + d)
                     : HalfLine{};
  };
  AERIE_UNROLL for (int p = 0; p < 16; ++p) {
    const HalfLine even = number(2 * p), odd = number(2 * p + 1);
    *reinterpret_cast<HalfLineInMemory*>(tiles + p * 32) = interleave<0>(even, odd, lanes);
    *reinterpret_cast<HalfLineInMemory*>(tiles + kTileElements + p * 32) =
        interleave<16>(even, odd, lanes);
  }
}

// Operands of one span, arranged as tiles.
struct RoundedWorkspace {
  alignas(64) uint16_t queries[kMaxQueryRows * kMaxHeadDim];
  alignas(64) uint16_t keys[kMaxColumns * kMaxHeadDim];
  alignas(64) uint16_t values[kSpan * kMaxHeadDim];
  alignas(64) uint16_t weights[(kMaxQueryRows + kTileRows) * kSpan];
  alignas(64) float mixed[kTileRows * 32];
  const uint16_t* key_at[kMaxColumns];  // null if no query of the tile sees the key
  const uint16_t* value_at[kSpan];      // by position
};

// Keys of the suffix that some query of a tile sees.
struct SeenSuffix {
  int64_t causal = 0;  // entries 0 .. causal-1
  uint64_t mask = 0;   // and the entries whose bits are set

  bool contains(int64_t i) const { return i < causal || (i < 64 && (mask >> i & 1)); }
};

inline SeenSuffix seen_suffix(const Problem<uint16_t>& p, const Tile& tile) {
  SeenSuffix seen;
  for (int64_t q = tile.first_query; q < tile.first_query + tile.num_queries; ++q) {
    const uint64_t mask = p.mask(tile.row, q);
    if (mask) seen.mask |= mask;
    else seen.causal = std::max(seen.causal, q + 1);
  }
  return seen;
}

inline int64_t value_offset(const Problem<uint16_t>& p, const Tile& tile, int64_t slot) {
  return (slot * p.num_kv_heads + tile.kv_head) * p.D;
}

// Set the address of each column's key, and of its value if the column is a position.
inline void locate(const Problem<uint16_t>& p, const Tile& tile, const Columns& columns,
                   const Workspace& work, RoundedWorkspace& tiles) {
  const SeenSuffix seen = seen_suffix(p, tile);
  const int64_t prefix = p.prefix_lens[tile.row];
  for (int64_t k = 0; k < round_up(columns.count, kTileK); ++k) {
    const int64_t entry = columns.begin + k - prefix;
    const bool used =
        k < columns.count && (k >= columns.direct || entry < 0 || seen.contains(entry));
    const int64_t at = used ? value_offset(p, tile, work.slots[k]) : 0;
    tiles.key_at[k] = used ? p.keys + at : nullptr;
    if (k < kSpan) tiles.value_at[k] = used ? p.values + at : nullptr;
  }
}

inline void pack_queries(const Problem<uint16_t>& p, const Tile& tile, int64_t rows,
                         RoundedWorkspace& tiles) {
  const int64_t chunks = p.D / kTileK;
  for (int64_t r = 0; r < round_up(rows, kTileRows); ++r)
    for (int64_t d = 0; d < p.D; d += 16) {
      uint16_t* to = tiles.queries + (r / kTileRows * chunks + d / kTileK) * kTileElements +
                     r % kTileRows * kTileK + d % kTileK;
      if (r < rows) store_rounded(to, query_row(p, tile, r) + d);
      else std::fill_n(to, 16, uint16_t{0});
    }
}

inline void pack_all_keys(const Problem<uint16_t>& p, int64_t count, RoundedWorkspace& tiles) {
  const int64_t chunks = p.D / kTileK;
  for (int64_t k = 0; k < count; k += kGroup)
    for (int64_t c = 0; c < chunks; ++c)
      pack_keys(reinterpret_cast<const uint16_t* const(&)[16]>(tiles.key_at[k]), c * kTileK,
                tiles.keys + (k / kGroup * chunks + c) * kTileElements);
}

inline void pack_value_blocks(const Problem<uint16_t>& p, int64_t first, int64_t last,
                              RoundedWorkspace& tiles) {
  for (int64_t b = first; b < last; ++b)
    for (int64_t d = 0; d < p.D; d += 32)
      pack_values(tiles.value_at + b * kTileK, d,
                  tiles.values + (b * (p.D / 16) + d / 16) * kTileElements);
}

// Mask the scores of rows first .. last-1, turn them into weights and round these.
inline void round_weights(const Problem<uint16_t>& p, const Tile& tile, int64_t first,
                          int64_t last, const Columns& columns, Workspace& work,
                          RoundedWorkspace& tiles, Partial* partials) {
  const int64_t count = columns.positions();
  for (int64_t r = first; r < last; ++r) {
    float* scores = work.scores[r];
    for (int64_t k = 0; k < columns.count; k += kGroup)
      store(scores + k, visible_scores(p, tile, r, columns, k, load(scores + k)));
    if (columns.branch)
      take_path(path_part(p, tile, tile.first_query + r / p.group(), columns), columns, scores);
    weigh_row(scores, count, partials[r]);
    uint16_t* to = tiles.weights + r * kSpan;
    for (int64_t k = 0; k < count; k += kGroup) store_rounded(to + k, scores + k);
    for (int64_t k = round_up(count, kGroup); k < round_up(count, kTileK); ++k) to[k] = 0;
  }
}

// Add the value blocks first .. last-1 to the results of rows begin .. end-1, at most sixteen;
// without `add`, overwrite the results instead.
template <class Products>
void mix_blocks(const Problem<uint16_t>& p, int64_t begin, int64_t end, int64_t first,
                       int64_t last, bool add, RoundedWorkspace& tiles, Partial* partials) {
  const int64_t per_block = p.D / 16;
  for (int64_t d = 0; d < p.D; d += 32) {
    for (int64_t r = begin; add && r < end; ++r)
      std::copy_n(partials[r].values + d, 32, tiles.mixed + (r - begin) * 32);
    Products::multiply_values(tiles.weights + begin * kSpan + first * kTileK, end - begin,
                              tiles.values + (first * per_block + d / 16) * kTileElements,
                              last - first, per_block, add, tiles.mixed);
    for (int64_t r = begin; r < end; ++r)
      std::copy_n(tiles.mixed + (r - begin) * 32, 32, partials[r].values + d);
  }
}

// Whether the path given by `mask` is the beginning of `path`.
inline bool begins_with(uint64_t path, uint64_t mask) {
  const uint64_t through = (uint64_t{2} << (63 - __builtin_clzll(mask))) - 1;
  return mask == (path & through);
}

// Pack the value blocks from `first` on along the path of a query; returns the end of the blocks.
inline int64_t pack_path(const Problem<uint16_t>& p, const Tile& tile, int64_t query,
                         const Columns& columns, int64_t first, const Workspace& work,
                         RoundedWorkspace& tiles) {
  const PathPart part = path_part(p, tile, query, columns);
  const int64_t last = round_up(columns.direct + part.count, kTileK) / kTileK;
  for (int64_t k = columns.direct; k < last * kTileK; ++k) {
    const int64_t i = k - columns.direct;
    tiles.value_at[k] = nullptr;
    if (i < part.count) {
      const int64_t slot = work.slots[columns.direct + part.column[i]];
      tiles.value_at[k] = p.values + value_offset(p, tile, slot);
    }
  }
  pack_value_blocks(p, first, last, tiles);
  return last;
}

// Add the value blocks from `first` on, path by path. A node is handled together with the last
// query whose path leads through it.
template <class Products>
void mix_paths(const Problem<uint16_t>& p, const Tile& tile, const Columns& columns,
                      int64_t first, const Workspace& work, RoundedWorkspace& tiles,
                      Partial* partials) {
  const int64_t group = p.group();
  uint64_t done = 0;
  for (int64_t leaf = tile.num_queries - 1; leaf >= 0; --leaf) {
    if (done >> leaf & 1) continue;
    const uint64_t path = p.mask(tile.row, tile.first_query + leaf);
    const int64_t last = pack_path(p, tile, tile.first_query + leaf, columns, first, work, tiles);
    for (int64_t q = leaf; q >= 0; --q) {
      if (done >> q & 1 || !begins_with(path, p.mask(tile.row, tile.first_query + q))) continue;
      done |= uint64_t{1} << q;
      for (int64_t r = q * group; r < (q + 1) * group; r += kTileRows)
        mix_blocks<Products>(p, r, std::min(r + kTileRows, (q + 1) * group), first, last, true,
                             tiles, partials);
    }
  }
}

template <class Products>
void attend_span_rounded(const Problem<uint16_t>& p, const Tile& tile, const Columns& columns,
                         Workspace& work, Partial* partials) {
  thread_local RoundedWorkspace tiles;
  const int64_t rows = tile.num_queries * p.group(), chunks = p.D / kTileK;
  const int64_t shared = columns.branch ? columns.direct / kTileK
                                        : round_up(columns.positions(), kTileK) / kTileK;
  locate(p, tile, columns, work, tiles);
  pack_queries(p, tile, rows, tiles);
  pack_all_keys(p, columns.count, tiles);
  pack_value_blocks(p, 0, shared, tiles);
  Products::begin();
  for (int64_t r = 0; r < rows; r += kTileRows) {  // sixteen rows of scores fit the L1 cache
    const int64_t last = std::min(r + kTileRows, rows);
    Products::multiply_keys(tiles.queries + r * p.D, last - r, tiles.keys,
                            round_up(columns.count, kGroup) / kGroup, chunks, work.scores[r]);
    round_weights(p, tile, r, last, columns, work, tiles, partials);
    mix_blocks<Products>(p, r, last, 0, shared, false, tiles, partials);
  }
  if (columns.branch) mix_paths<Products>(p, tile, columns, shared, work, tiles, partials);
  Products::end();
}

#endif

}  // namespace aerie
