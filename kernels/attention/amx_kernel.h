// The products of rounded_kernel.h on the tile registers of Intel AMX.
#pragma once

#include "rounded_kernel.h"

namespace aerie {

#if AERIE_HAS_AMX

struct TileProducts {
  static void begin() { configure_tiles(kTileRows, kTileRows); }
  static void end() { _tile_release(); }

  // Computes all sixteen rows, whatever their number.
  static void multiply_keys(const uint16_t* queries, int64_t, const uint16_t* keys,
                            int64_t num_groups, int64_t num_chunks, float* scores) {
    constexpr int64_t bytes = kMaxColumns * sizeof(float);
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
      _tile_stored(0, scores + g * 16, bytes);
      if (second) _tile_stored(1, scores + (g + 1) * 16, bytes);
    }
  }

  static void multiply_values(const uint16_t* weights, int64_t, const uint16_t* values,
                              int64_t num_blocks, int64_t per_block, bool add, float* out) {
    if (add) {
      _tile_loadd(0, out, 32 * sizeof(float));
      _tile_loadd(1, out + 16, 32 * sizeof(float));
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (int64_t b = 0; b < num_blocks; ++b) {
      _tile_loadd(4, weights + b * kTileK, kSpan * sizeof(uint16_t));
      _tile_loadd(6, values + b * per_block * kTileElements, 64);
      _tile_loadd(7, values + (b * per_block + 1) * kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out, 32 * sizeof(float));
    _tile_stored(1, out + 16, 32 * sizeof(float));
  }
};

#endif

}  // namespace aerie
