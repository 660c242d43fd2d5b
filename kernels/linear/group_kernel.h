// x [M, K] times a weight quantised in groups, on dot products of bytes.
//
// Every output is one chain of multiply-adds over the groups of a row, each of an exact integer, so
// its value does not depend on the number of rows, on the block sizes below, or on the thread that
// computes it.
#pragma once

#include "group_inputs.h"
#include "group_panels.h"
#include "vector_kernel.h"

namespace aerie {

// Rows that share one unpacking of the codes, as many as registers allow. One panel at a time: memory
// is then read in one stream, which measured up to a quarter faster than two or four.
constexpr int kMaxGroupRows = kLanes == 16 ? 8 : 2;

// With many rows the hardware does not read far enough ahead by itself; with few it does better alone.
constexpr int kUnhurriedGroupRows = 4;
constexpr int kReadAhead = 2048;  // bytes

// The dot products of the upper and lower bytes of sixteen-bit inputs.
template <int Bits>
struct WideDot {
  Dot<Bits> high, low;

  AERIE_INLINE void start(int32_t first) { high.start(0), low.start(first); }
  AERIE_INLINE void add(I16 codes, int32_t high_quad, int32_t low_quad) {
    high.add(codes, high_quad);
    low.add(codes, low_quad);
  }
  AERIE_INLINE I16 total() const {
    I16 sum = low.total();
    const I16 upper = high.total();
    AERIE_EACH_PART sum.part[i] += upper.part[i] << 8;
    return sum;
  }
};

AERIE_INLINE int32_t load_quad(const int8_t* from) {
  int32_t quad;
  std::memcpy(&quad, from, sizeof quad);
  return quad;
}

template <class Kind, int Rows>
struct GroupBlock {
  WideDot<Kind::kBits> dots[Rows];
  F16 sums[Rows];

  // Multiply a quad of the panel by the inputs from `at` (of row 0) on.
  AERIE_INLINE void add_quad(I16 codes, const GroupInputs& x, int64_t at) {
    AERIE_UNROLL for (int r = 0; r < Rows; ++r, at += x.K)
      dots[r].add(codes, load_quad(x.high + at), load_quad(x.low + at));
  }

  AERIE_INLINE void add_line(const uint8_t* from, const GroupInputs& x, int64_t at) {
    if constexpr (Rows > kUnhurriedGroupRows) __builtin_prefetch(from + kReadAhead);
    const I16 line = load_line(from);
    if constexpr (Kind::kBits == 8) return add_quad(line, x, at);
    add_quad(lower_codes(line), x, at);
    add_quad(upper_codes(line), x, at + Kind::kLines * 4);
  }

  // Scale the dot products of group `at` (of row 0) and add them up.
  AERIE_INLINE void scale(const uint8_t* group, const GroupInputs& x, int64_t at) {
    using Scale = typename Kind::ScaleType;
    const F16 scales = load_scales(reinterpret_cast<const Scale*>(group + Kind::kScales));
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
      const F16 both = scales * broadcast(x.scales[at + r * x.groups]);
      sums[r] = multiply_add(to_float(dots[r].total()), both, sums[r]);
    }
    if constexpr (Kind::kHasMinimum) {
      const F16 minimums = load_scales(reinterpret_cast<const Scale*>(group + Kind::kMinimums));
      AERIE_UNROLL for (int r = 0; r < Rows; ++r)
        sums[r] = multiply_add(minimums, broadcast(x.scaled_sums[at + r * x.groups]), sums[r]);
    }
  }

  AERIE_INLINE void add_group(const uint8_t* group, const GroupInputs& x, int64_t row, int64_t g) {
    const int64_t at = row * x.groups + g;
    AERIE_UNROLL for (int r = 0; r < Rows; ++r)
      dots[r].start(-Kind::kZero * x.sums[at + r * x.groups]);
    const int64_t first = row * x.K + g * Kind::kGroup;
    AERIE_UNROLL for (int j = 0; j < Kind::kLines; ++j)
      add_line(group + j * kLine, x, first + 4 * j);
    scale(group, x, at);
  }
};

// A whole product: where everything lies.
struct GroupProduct {
  LinearShape shape;
  GroupInputs x;
  const uint8_t* weight;
  const float* bias;  // [N] or null
  float* out;         // [M, N], rows `stride` apart
  int64_t stride;
};

// Multiply the rows row .. row+Rows-1 by one panel.
template <class Kind, int Rows>
void multiply_panel(const GroupProduct& p, int64_t row, int64_t panel) {
  const uint8_t* group = p.weight + panel * Kind::panel_bytes(p.shape.K);
  GroupBlock<Kind, Rows> block{};
  for (int64_t g = 0; g < p.x.groups; ++g, group += Kind::kBytes) block.add_group(group, p.x, row, g);
  const int64_t column = panel * kPanel, columns = p.shape.N - column;
  const F16 offset = p.bias ? load_columns(p.bias + column, columns) : F16{};
  AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
    const F16 sum = block.sums[r];
    store_columns(p.out + (row + r) * p.stride + column, p.bias ? sum + offset : sum, columns);
  }
}

// Multiply `rows` rows from `row` on, at most kMaxGroupRows, by the panels first .. last-1.
template <class Kind, int Rows = 1>
void multiply_panels(int64_t rows, const GroupProduct& p, int64_t row, int64_t first, int64_t last) {
  if (rows == Rows) {
    for (int64_t panel = first; panel < last; ++panel) multiply_panel<Kind, Rows>(p, row, panel);
    return;
  }
  if constexpr (Rows < kMaxGroupRows)
    multiply_panels<Kind, Rows + 1>(rows, p, row, first, last);
}

}  // namespace aerie
