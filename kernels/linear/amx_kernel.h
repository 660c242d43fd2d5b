// x [M, K] float32 times a packed bfloat16 weight, on the tile registers of Intel AMX.
//
// AMX multiplies bfloat16 only. Each input is split into two bfloat16 numbers, x = high + low, which
// together keep 16 of its 24 bits (relative error below 2^-17, an eightieth of what rounding the
// input to bfloat16 would cost); both parts are multiplied and summed in float32.
//
// Every output is one chain over k in blocks of 32, high before low: its value does not depend on
// the number of rows or on the thread that computes it.
#pragma once

#include "../native/vector.h"
#include "panels.h"
#include "vector_kernel.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define AERIE_HAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define AERIE_HAS_AMX 0
#endif

namespace aerie {

#if AERIE_HAS_AMX

// The kernel grants the tile registers to a process on request (Documentation/arch/x86/xstate.rst).
inline bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr int kTileRows = 16;
constexpr int kRowBlock = 2 * kTileRows;

// Inputs as bfloat16 pairs of numbers, padded with zeros: [M, round_up(K, 32)] each.
struct SplitInputs {
  uint16_t* high;
  uint16_t* low;
  int64_t stride;
};

inline void split_row(const float* x, int64_t K, int64_t row, const SplitInputs& to) {
  uint16_t* high = to.high + row * to.stride;
  uint16_t* low = to.low + row * to.stride;
  for (int64_t k = 0; k < to.stride; k += 16) {
    const F16 whole = k + 16 <= K ? load(x + k) : k < K ? load_columns(x + k, K - k) : F16{};
    const U16 upper = to_bfloat16(whole);
    store_halves(high + k, upper);
    store_halves(low + k, to_bfloat16(whole - lower_halves(upper)));
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 accumulate (row half r, panel p -> 2r + p), 4 and 5 hold inputs, 6 and 7 weights.
inline void configure_tiles(int upper_rows, int lower_rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.column_bytes[t] = 64;
  config.rows[0] = config.rows[1] = config.rows[4] = upper_rows;
  config.rows[2] = config.rows[3] = config.rows[5] = lower_rows;
  config.rows[6] = config.rows[7] = kTileRows;
  _tile_loadconfig(&config);
}

// One row block (both halves when Lower) against two panels (one when !Second).
template <bool Lower, bool Second>
AERIE_INLINE void multiply_tiles(const SplitInputs& x, int64_t row, const uint16_t* weight,
                                 int64_t size, float (&sums)[4][kTileRows * kPanel]) {
  constexpr int64_t kTile = kTileK * kPanel;  // elements
  const int64_t stride = x.stride * 2;        // bytes
  const uint16_t* second = weight + size;
  _tile_zero(0);
  if constexpr (Second) _tile_zero(1);
  if constexpr (Lower) _tile_zero(2);
  if constexpr (Lower && Second) _tile_zero(3);
  for (int64_t k = 0; k < x.stride; k += kTileK) {
    _tile_loadd(6, weight + k / kTileK * kTile, 64);
    if constexpr (Second) _tile_loadd(7, second + k / kTileK * kTile, 64);
    for (const uint16_t* inputs : {x.high, x.low}) {
      _tile_loadd(4, inputs + row * x.stride + k, stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Second) _tile_dpbf16ps(1, 4, 7);
      if constexpr (Lower) {
        _tile_loadd(5, inputs + (row + kTileRows) * x.stride + k, stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (Second) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums[0], 64);
  if constexpr (Second) _tile_stored(1, sums[1], 64);
  if constexpr (Lower) _tile_stored(2, sums[2], 64);
  if constexpr (Lower && Second) _tile_stored(3, sums[3], 64);
}

inline void multiply_tile_block(const LinearShape& shape, const SplitInputs& x, int64_t row,
                                int rows, const uint16_t* weight, const float* bias, float* out,
                                int64_t panel, bool second) {
  alignas(64) float sums[4][kTileRows * kPanel];
  const int64_t size = panel_size(weight, shape.K);
  const uint16_t* first = weight + panel * size;
  const bool lower = rows > kTileRows;
  if (lower && second) multiply_tiles<true, true>(x, row, first, size, sums);
  else if (lower) multiply_tiles<true, false>(x, row, first, size, sums);
  else if (second) multiply_tiles<false, true>(x, row, first, size, sums);
  else multiply_tiles<false, false>(x, row, first, size, sums);
  for (int p = 0; p <= int(second); ++p) {
    const int64_t column = (panel + p) * kPanel, columns = shape.N - column;
    const F16 offset = bias ? load_columns(bias + column, columns) : F16{};
    for (int r = 0; r < rows; ++r) {
      const F16 sum = load(sums[r / kTileRows * 2 + p] + r % kTileRows * kPanel);
      store_columns(out + (row + r) * shape.N + column, bias ? sum + offset : sum, columns);
    }
  }
}

// All rows against the panels first .. last-1.
inline void multiply_panels(const LinearShape& shape, const SplitInputs& x, const uint16_t* weight,
                            const float* bias, float* out, int64_t first, int64_t last) {
  for (int64_t row = 0; row < shape.M; row += kRowBlock) {
    const int rows = static_cast<int>(shape.M - row < kRowBlock ? shape.M - row : kRowBlock);
    const bool lower = rows > kTileRows;
    configure_tiles(lower ? kTileRows : rows, lower ? rows - kTileRows : kTileRows);
    for (int64_t panel = first; panel < last; panel += 2)
      multiply_tile_block(shape, x, row, rows, weight, bias, out, panel, panel + 1 < last);
  }
  _tile_release();
}

#endif

}  // namespace aerie
