// The products of rounded_kernel.h by the bfloat16 dot products of AVX-512. Every sum is one chain
// over pairs of dimensions or of keys, however many rows and tiles are multiplied at once.
#pragma once

#include "rounded_kernel.h"

namespace aerie {

#if AERIE_HAS_DOTS

constexpr int kMaxDotRows = 8;

// Rows x Tiles sums, of sixteen lanes each.
template <int Rows, int Tiles>
struct DotSums {
  F16 sums[Rows][Tiles];

  // Add the products of 32 inputs of each row, rows `stride` elements apart, with tiles `apart`
  // elements apart.
  AERIE_INLINE void add(const uint16_t* inputs, int64_t stride, const uint16_t* tile,
                        int64_t apart) {
    for (int k = 0; k < kTileK; k += 2, inputs += 2, tile += 2 * kPanel) {
      U16 pairs[Tiles];
      AERIE_UNROLL for (int t = 0; t < Tiles; ++t) pairs[t] = load_pairs(tile + t * apart);
      AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
        const uint32_t pair = pair_at(inputs + r * stride);
        AERIE_UNROLL for (int t = 0; t < Tiles; ++t)
          sums[r][t] = add_dots(sums[r][t], pairs[t], pair);
      }
    }
  }

  AERIE_INLINE void load_from(const float* from, int64_t stride) {
    AERIE_UNROLL for (int r = 0; r < Rows; ++r)
      AERIE_UNROLL for (int t = 0; t < Tiles; ++t) sums[r][t] = load(from + r * stride + t * 16);
  }

  AERIE_INLINE void store_to(float* to, int64_t stride) const {
    AERIE_UNROLL for (int r = 0; r < Rows; ++r)
      AERIE_UNROLL for (int t = 0; t < Tiles; ++t) store(to + r * stride + t * 16, sums[r][t]);
  }
};

struct DotProducts {
  static void begin() {}
  static void end() {}

  static void multiply_keys(const uint16_t* queries, int64_t rows, const uint16_t* keys,
                            int64_t num_groups, int64_t num_chunks, float* scores) {
    for_row_blocks(rows, [&](auto count, int64_t row) {
      constexpr int Rows = count(), wide = Rows <= 4 ? 4 : 2;
      const uint16_t* from = queries + row * kTileK;
      float* to = scores + row * kMaxColumns;
      int64_t g = 0;
      for (; g + wide <= num_groups; g += wide)
        score_groups<Rows, wide>(from, keys, g, num_chunks, to);
      for (; g < num_groups; ++g) score_groups<Rows, 1>(from, keys, g, num_chunks, to);
    });
  }

  static void multiply_values(const uint16_t* weights, int64_t rows, const uint16_t* values,
                              int64_t num_blocks, int64_t per_block, bool add, float* out) {
    for_row_blocks(rows, [&](auto count, int64_t row) {
      DotSums<count(), 2> mixed{};
      float* to = out + row * 32;
      if (add) mixed.load_from(to, 32);
      for (int64_t b = 0; b < num_blocks; ++b)
        mixed.add(weights + row * kSpan + b * kTileK, kSpan,
                  values + b * per_block * kTileElements, kTileElements);
      mixed.store_to(to, 32);
    });
  }

 private:
  template <int Rows, int Groups>
  static void score_groups(const uint16_t* queries, const uint16_t* keys, int64_t group,
                           int64_t num_chunks, float* scores) {
    const int64_t apart = num_chunks * kTileElements;
    DotSums<Rows, Groups> found{};
    for (int64_t c = 0; c < num_chunks; ++c)
      found.add(queries + c * kTileElements, kTileK, keys + group * apart + c * kTileElements,
                apart);
    found.store_to(scores + group * kGroup, kMaxColumns);
  }

  // Call use(number of rows, first row) for blocks of nearly equal size; the number is a constant.
  template <class Use>
  static void for_row_blocks(int64_t rows, const Use& use) {
    const int64_t blocks = (rows + kMaxDotRows - 1) / kMaxDotRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = rows * b / blocks;
      with_count<1>(rows * (b + 1) / blocks - row, row, use);
    }
  }

  template <int Count, class Use>
  static void with_count(int64_t count, int64_t row, const Use& use) {
    if (count == Count) return use(std::integral_constant<int, Count>{}, row);
    if constexpr (Count < kMaxDotRows) with_count<Count + 1>(count, row, use);
  }
};

#endif

}  // namespace aerie
