// x [M, K] times a packed bfloat16 weight, on the bfloat16 dot products of AVX-512.
//
// As with AMX, inputs are rounded to bfloat16, and products are summed in float32. Every output is
// one chain of dot products of two over k = 0, 2, 4, ...: its value does not depend on the number
// of rows, on the block sizes below, or on the thread that computes it.
#pragma once

#include <algorithm>

#include "rounded_inputs.h"
#include "vector_kernel.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define AERIE_HAS_DOTS 1
#else
#define AERIE_HAS_DOTS 0
#endif

namespace aerie {

#if AERIE_HAS_DOTS

// Per lane: sum + the products of both numbers of `pairs` with those of `pair`.
AERIE_INLINE F16 add_dots(F16 sum, U16 pairs, uint32_t pair) {
  const __m512i both = _mm512_set1_epi32(static_cast<int>(pair));
  sum.part[0] =
      (Vec)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)both, (__m512bh)pairs.part[0]);
  return sum;
}

AERIE_INLINE uint32_t pair_at(const uint16_t* from) {
  uint32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}

// Rounded inputs in the row blocks of first_row(). A block of n rows holds, for every chunk of
// kTileK inputs, its n rows one after the other.
struct BlockedInputs {
  uint16_t* numbers;
  int64_t chunks;

  AERIE_INLINE uint16_t* block(int64_t row) const { return numbers + row * chunks * kTileK; }
};

// Blocks of more rows read their few panels too slowly for the CPU to fetch far ahead by itself.
constexpr int kUnhurriedRows = 6;
constexpr int64_t kAhead = 16 * 2 * kPanel;

template <int Rows, int Panels>
void multiply_dot_block(const LinearShape& shape, const BlockedInputs& x, int64_t row,
                        const uint16_t* weight, const float* bias, float* out, int64_t panel) {
  const int64_t size = panel_size(weight, shape.K);
  const uint16_t* inputs = x.block(row);
  const uint16_t* lines = weight + panel * size;
  F16 sums[Rows][Panels];
  AERIE_UNROLL for (int r = 0; r < Rows; ++r)
    AERIE_UNROLL for (int p = 0; p < Panels; ++p) sums[r][p] = F16{};
  for (int64_t c = 0; c < x.chunks; ++c, inputs += (Rows - 1) * kTileK)
    for (int k = 0; k < kTileK; k += 2, inputs += 2, lines += 2 * kPanel) {
      U16 pairs[Panels];
      AERIE_UNROLL for (int p = 0; p < Panels; ++p) {
        pairs[p] = load_pairs(lines + p * size);
        if constexpr (Rows > kUnhurriedRows) __builtin_prefetch(lines + p * size + kAhead);
      }
      AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
        const uint32_t pair = pair_at(inputs + r * kTileK);
        AERIE_UNROLL for (int p = 0; p < Panels; ++p)
          sums[r][p] = add_dots(sums[r][p], pairs[p], pair);
      }
    }
  AERIE_UNROLL for (int p = 0; p < Panels; ++p) {
    const int64_t column = (panel + p) * kPanel, columns = shape.N - column;
    const F16 offset = bias ? load_columns(bias + column, columns) : F16{};
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
      const F16 sum = sums[r][p];
      store_columns(out + (row + r) * shape.N + column, bias ? sum + offset : sum, columns);
    }
  }
}

// Multiply Rows rows by the panels first .. last-1.
template <int Rows>
void multiply_dot_rows(const LinearShape& shape, const BlockedInputs& x, int64_t row,
                       const uint16_t* weight, const float* bias, float* out, int64_t first,
                       int64_t last) {
  constexpr int wide = panels_at_once(Rows);
  for (; first + wide <= last; first += wide)
    multiply_dot_block<Rows, wide>(shape, x, row, weight, bias, out, first);
  for (; first < last; ++first)
    multiply_dot_block<Rows, 1>(shape, x, row, weight, bias, out, first);
}

template <int Rows = 1>
void dispatch_dot_rows(int64_t rows, const LinearShape& shape, const BlockedInputs& x, int64_t row,
                       const uint16_t* weight, const float* bias, float* out, int64_t first,
                       int64_t last) {
  if (rows == Rows)
    return multiply_dot_rows<Rows>(shape, x, row, weight, bias, out, first, last);
  if constexpr (Rows < kMaxRows)
    dispatch_dot_rows<Rows + 1>(rows, shape, x, row, weight, bias, out, first, last);
}

// Row blocks of a group: their inputs stay in the L2 cache for all panels.
constexpr int64_t kBlocksPerGroup = 256 / kMaxRows;

inline int64_t num_dot_groups(int64_t M) {
  return (num_row_blocks(M) + kBlocksPerGroup - 1) / kBlocksPerGroup;
}

// Multiply one group of row blocks by the panels first .. last-1.
inline void multiply_dot_group(const LinearShape& shape, const BlockedInputs& x, int64_t group,
                               const uint16_t* weight, const float* bias, float* out,
                               int64_t first, int64_t last) {
  const int64_t begin = group * kBlocksPerGroup;
  const int64_t end = std::min(begin + kBlocksPerGroup, num_row_blocks(shape.M));
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row = first_row(b, shape.M);
    dispatch_dot_rows(first_row(b + 1, shape.M) - row, shape, x, row, weight, bias, out, first,
                      last);
  }
}

#endif

}  // namespace aerie
