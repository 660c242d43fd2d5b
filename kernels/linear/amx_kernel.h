// x [M, K] times a packed bfloat16 weight, on the tile registers of Intel AMX.
//
// AMX multiplies bfloat16 only, so inputs are rounded to it, as on every accelerator; products are
// exact and summed in float32. Every output is one chain of sums over k in blocks of 32: its value
// does not depend on the number of rows or on the thread that computes it.
#pragma once

#include <algorithm>

#include "../native/tiles.h"
#include "../native/vector.h"
#include "rounded_inputs.h"
#include "vector_kernel.h"

namespace aerie {

#if AERIE_HAS_AMX

constexpr int kRowBlock = 2 * kTileRows;

// Inputs as bfloat16 in the order in which tiles are loaded: tiles of 32 inputs for every 16 rows,
// padded with zeros along K.
struct TiledInputs {
  uint16_t* tiles;
  int64_t chunks;  // tiles along K

  static constexpr int64_t kTile = kTileRows * kTileK;  // elements

  static int64_t size(int64_t M, int64_t K) {
    return round_up(M, kTileRows) * round_up(K, kTileK);
  }
  uint16_t* tile(int64_t row, int64_t chunk) const {
    return tiles + (row / kTileRows * chunks + chunk) * kTile;
  }
};

// Tiles 0-3 accumulate (row half r, panel p -> 2r + p), 4 and 5 hold inputs, 6 and 7 weights.
inline void configure_tiles(int64_t upper_rows, int64_t lower_rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.column_bytes[t] = 64;
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper_rows);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(lower_rows);
  config.rows[6] = config.rows[7] = kTileRows;
  _tile_loadconfig(&config);
}

// Where the four accumulators are stored: tile (row half r, panel p) goes to
// first + r * 16 * stride + p * 16.
struct TileTarget {
  float* first;
  int64_t stride;  // floats between rows
};

// Multiply one row block (both halves if Lower) by two panels (one if !Second).
template <bool Lower, bool Second>
AERIE_INLINE void multiply_tiles(const TiledInputs& x, int64_t row, const uint16_t* weight,
                                 int64_t size, const TileTarget& to) {
  constexpr int64_t kTile = TiledInputs::kTile;
  const uint16_t* upper = x.tile(row, 0);
  const uint16_t* lower = x.tile(row + kTileRows, 0);
  const uint16_t* second = weight + size;
  _tile_zero(0);
  if constexpr (Second) _tile_zero(1);
  if constexpr (Lower) _tile_zero(2);
  if constexpr (Lower && Second) _tile_zero(3);
  for (int64_t c = 0; c < x.chunks; ++c) {
    _tile_loadd(6, weight + c * kTile, 64);
    if constexpr (Second) _tile_loadd(7, second + c * kTile, 64);
    _tile_loadd(4, upper + c * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Second) _tile_dpbf16ps(1, 4, 7);
    if constexpr (Lower) {
      _tile_loadd(5, lower + c * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Second) _tile_dpbf16ps(3, 5, 7);
    }
  }
  const int64_t bytes = to.stride * sizeof(float);
  float* below = to.first + kTileRows * to.stride;
  _tile_stored(0, to.first, bytes);
  if constexpr (Second) _tile_stored(1, to.first + kPanel, bytes);
  if constexpr (Lower) _tile_stored(2, below, bytes);
  if constexpr (Lower && Second) _tile_stored(3, below + kPanel, bytes);
}

inline void multiply_tile_block(const TiledInputs& x, int64_t row, bool lower,
                                const uint16_t* weight, int64_t size, bool second,
                                const TileTarget& to) {
  if (lower && second) return multiply_tiles<true, true>(x, row, weight, size, to);
  if (lower) return multiply_tiles<true, false>(x, row, weight, size, to);
  if (second) return multiply_tiles<false, true>(x, row, weight, size, to);
  multiply_tiles<false, false>(x, row, weight, size, to);
}

// Multiply `rows` rows by one or two panels through a buffer: for a bias, or a panel cut off by N.
inline void multiply_edge_block(const LinearShape& shape, const TiledInputs& x, int64_t row,
                                int64_t rows, const uint16_t* weight, const float* bias,
                                float* out, int64_t column, bool second) {
  alignas(64) float sums[kRowBlock][2 * kPanel];
  multiply_tile_block(x, row, rows > kTileRows, weight, panel_size(weight, shape.K), second,
                      {sums[0], 2 * kPanel});
  for (int p = 0; p <= int(second); ++p, column += kPanel) {
    const int64_t columns = shape.N - column;
    const F16 offset = bias ? load_columns(bias + column, columns) : F16{};
    for (int64_t r = 0; r < rows; ++r) {
      const F16 sum = load(sums[r] + p * kPanel);
      store_columns(out + (row + r) * shape.N + column, bias ? sum + offset : sum, columns);
    }
  }
}

// Multiply rows first_row .. last_row-1, in blocks of `rows`, by the panels first .. last-1. A pair
// of panels stays in the L1 cache for all these rows.
inline void multiply_row_blocks(const LinearShape& shape, const TiledInputs& x, int64_t first_row,
                                int64_t last_row, int64_t rows, const uint16_t* weight,
                                const float* bias, float* out, int64_t first, int64_t last) {
  const bool lower = rows > kTileRows;
  const int64_t size = panel_size(weight, shape.K);
  configure_tiles(lower ? kTileRows : rows, lower ? rows - kTileRows : kTileRows);
  for (int64_t panel = first; panel < last; panel += 2) {
    const bool second = panel + 1 < last;
    const int64_t column = panel * kPanel, end = column + (second ? 2 : 1) * kPanel;
    for (int64_t row = first_row; row < last_row; row += rows) {
      if (bias || end > shape.N)
        multiply_edge_block(shape, x, row, rows, weight + panel * size, bias, out, column, second);
      else
        multiply_tile_block(x, row, lower, weight + panel * size, size, second,
                            {out + row * shape.N + column, shape.N});
    }
  }
}

// Rows of a group: their inputs stay in the L2 cache for all panels.
constexpr int64_t kGroupRows = 8 * kRowBlock;

inline int64_t num_row_groups(int64_t M) { return (M + kGroupRows - 1) / kGroupRows; }

// Multiply one group of rows by the panels first .. last-1: whole row blocks, then the other rows.
inline void multiply_group(const LinearShape& shape, const TiledInputs& x, int64_t group,
                           const uint16_t* weight, const float* bias, float* out, int64_t first,
                           int64_t last) {
  const int64_t row = group * kGroupRows, rows = std::min(kGroupRows, shape.M - row);
  const int64_t left = rows % kRowBlock, end = row + rows;
  if (left < rows)
    multiply_row_blocks(shape, x, row, end - left, kRowBlock, weight, bias, out, first, last);
  if (left) multiply_row_blocks(shape, x, end - left, end, left, weight, bias, out, first, last);
  _tile_release();
}

#endif

}  // namespace aerie
