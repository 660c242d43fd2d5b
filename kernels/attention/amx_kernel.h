// The products of attention on the tile registers of Intel AMX, for bfloat16 caches.
//
// Queries and softmax weights are rounded to bfloat16; products are summed in float32. The sums of
// one query run over dimensions in blocks of 32 and over keys in blocks of 32 from the span's
// beginning, whatever other queries share the tile: its result does not depend on them.
#pragma once

#include "../linear/amx_kernel.h"

namespace aerie {

#if AERIE_HAS_AMX

constexpr int64_t kTileElements = kTileRows * kTileK;  // bfloat16 numbers

inline void configure_full_tiles() { configure_tiles(kTileRows, kTileRows); }

// One stage of Eklundh's transposition: exchange the blocks of Size lanes off the diagonal.
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

// 32 values x 16 dimensions, as a tile of weights: line p holds values 2p, 2p + 1.
inline void pack_values(const uint16_t* const* values, int64_t d, uint16_t* tile) {
  AERIE_UNROLL for (int p = 0; p < 16; ++p) {
    const uint16_t *even = values[2 * p], *odd = values[2 * p + 1];
    UVec pair{};
    if (even) pair |= ((UVec)load(even + d).part[0]) >> 16;
    if (odd) pair |= (UVec)load(odd + d).part[0];
    *reinterpret_cast<UVecInMemory*>(tile + p * 32) = pair;
  }
}

// scores[16 rows][num_groups x 16] = queries x keys, before scaling. `queries`: num_chunks tiles
// of 16 rows x 32 dimensions; `keys`: num_groups x num_chunks tiles.
inline void multiply_keys(const uint16_t* queries, const uint16_t* keys, int64_t num_groups,
                          int64_t num_chunks, float* scores, int64_t stride) {
  for (int64_t g = 0; g < num_groups; g += 2) {
    const bool second = g + 1 < num_groups;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t c = 0; c < num_chunks; ++c) {
      _tile_loadd(4, queries + c * kTileElements, 64);
      _tile_loadd(6, keys + (g * num_chunks + c) * kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (!second) continue;
      _tile_loadd(7, keys + ((g + 1) * num_chunks + c) * kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, scores + g * 16, stride * sizeof(float));
    if (second) _tile_stored(1, scores + (g + 1) * 16, stride * sizeof(float));
  }
}

// out[16 rows][32 dimensions] = weights x values. `weights`: [16 rows][stride] bfloat16; `values`:
// for each of num_blocks x 32 keys, tiles of 16 dimensions, `per_block` of them.
inline void multiply_values(const uint16_t* weights, int64_t stride, const uint16_t* values,
                            int64_t num_blocks, int64_t per_block, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t b = 0; b < num_blocks; ++b) {
    _tile_loadd(4, weights + b * kTileK, stride * sizeof(uint16_t));
    _tile_loadd(6, values + b * per_block * kTileElements, 64);
    _tile_loadd(7, values + (b * per_block + 1) * kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, out, 32 * sizeof(float));
  _tile_stored(1, out + 16, 32 * sizeof(float));
}

#endif

}  // namespace aerie
