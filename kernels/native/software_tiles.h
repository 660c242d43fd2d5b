// What the tile instructions of Intel AMX do, in plain C++ (Intel 64 and IA-32 Architectures Software
// Developer's Manual, volume 2). For tests on CPUs without them; see tiles.h.
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

namespace aerie::software_tiles {

struct Tile {
  int rows = 0, column_bytes = 0;
  uint8_t bytes[16][64] = {};

  template <class T>
  T get(int row, int column) const {
    T value;
    std::memcpy(&value, bytes[row] + column * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void set(int row, int column, T value) {
    std::memcpy(bytes[row] + column * sizeof(T), &value, sizeof(T));
  }
};

inline thread_local Tile tiles[8];

inline void configure(const void* config) {
  const auto* from = static_cast<const uint8_t*>(config);
  for (int t = 0; t < 8; ++t) {
    uint16_t column_bytes;
    std::memcpy(&column_bytes, from + 16 + 2 * t, sizeof column_bytes);
    tiles[t] = {from[48 + t], column_bytes};
  }
}

inline void release() {
  for (Tile& tile : tiles) tile = {};
}

inline void zero(int t) { std::memset(tiles[t].bytes, 0, sizeof tiles[t].bytes); }

inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int row = 0; row < tiles[t].rows; ++row)
    std::memcpy(tiles[t].bytes[row], static_cast<const char*>(from) + row * stride,
                tiles[t].column_bytes);
}

inline void store(int t, void* to, int64_t stride) {
  for (int row = 0; row < tiles[t].rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[t].bytes[row], tiles[t].column_bytes);
}

// sums[m][n] += the products of the k-th four bytes of row m of `a` and column n of row k of `b`.
template <class T, class Product>
void dot(int sums, int a, int b, const Product& product) {
  for (int m = 0; m < tiles[sums].rows; ++m)
    for (int n = 0; n < tiles[sums].column_bytes / 4; ++n) {
      T sum = tiles[sums].get<T>(m, n);
      for (int k = 0; k < tiles[a].column_bytes / 4; ++k)
        sum = product(sum, tiles[a].bytes[m] + 4 * k, tiles[b].bytes[k] + 4 * n);
      tiles[sums].set(m, n, sum);
    }
}

inline float widen(const uint8_t* bfloat16) {
  uint16_t half;
  std::memcpy(&half, bfloat16, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void dot_bfloat16(int sums, int a, int b) {
  dot<float>(sums, a, b, [](float sum, const uint8_t* x, const uint8_t* y) {
    return sum + widen(x) * widen(y) + widen(x + 2) * widen(y + 2);
  });
}

// Signed bytes of `a` times unsigned bytes of `b`.
inline void dot_bytes(int sums, int a, int b) {
  dot<int32_t>(sums, a, b, [](int32_t sum, const uint8_t* x, const uint8_t* y) {
    for (int i = 0; i < 4; ++i) sum += int32_t{static_cast<int8_t>(x[i])} * y[i];
    return sum;
  });
}

}  // namespace aerie::software_tiles

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) aerie::software_tiles::configure(config)
#define _tile_release() aerie::software_tiles::release()
#define _tile_zero(t) aerie::software_tiles::zero(t)
#define _tile_loadd(t, from, stride) aerie::software_tiles::load(t, from, stride)
#define _tile_stored(t, to, stride) aerie::software_tiles::store(t, to, stride)
#define _tile_dpbf16ps(sums, a, b) aerie::software_tiles::dot_bfloat16(sums, a, b)
#define _tile_dpbsud(sums, a, b) aerie::software_tiles::dot_bytes(sums, a, b)
