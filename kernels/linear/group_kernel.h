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

constexpr int kMaxGroupRows = kLanes == 16 ? 4 : 2;

constexpr int group_panels_at_once(int rows) {
  if (kLanes == 16) return rows == 1 ? 4 : 2;
  return rows == 1 ? 2 : 1;
}

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

template <class Kind, int Rows, int Panels>
struct GroupBlock {
  WideDot<Kind::kBits> dots[Rows][Panels];
  F16 sums[Rows][Panels];

  // Multiply a quad of each panel by the inputs from `at` (of row 0) on.
  AERIE_INLINE void add_quad(const I16 (&codes)[Panels], const GroupInputs& x, int64_t at) {
    AERIE_UNROLL for (int r = 0; r < Rows; ++r, at += x.K) {
      const int32_t high = load_quad(x.high + at), low = load_quad(x.low + at);
      AERIE_UNROLL for (int p = 0; p < Panels; ++p) dots[r][p].add(codes[p], high, low);
    }
  }

  AERIE_INLINE void add_line(const uint8_t* line, int64_t size, const GroupInputs& x, int64_t at) {
    I16 lines[Panels], codes[Panels];
    AERIE_UNROLL for (int p = 0; p < Panels; ++p) lines[p] = load_line(line + p * size);
    if constexpr (Kind::kBits == 8) return add_quad(lines, x, at);
    AERIE_UNROLL for (int p = 0; p < Panels; ++p) codes[p] = lower_codes(lines[p]);
    add_quad(codes, x, at);
    AERIE_UNROLL for (int p = 0; p < Panels; ++p) codes[p] = upper_codes(lines[p]);
    add_quad(codes, x, at + Kind::kLines * 4);
  }

  // Scale the dot products of group `at` (of row 0) and add them up.
  AERIE_INLINE void scale(const uint8_t* group, int64_t size, const GroupInputs& x, int64_t at) {
    using Scale = typename Kind::ScaleType;
    AERIE_UNROLL for (int p = 0; p < Panels; ++p) {
      const uint8_t* from = group + p * size;
      const F16 scales = load_scales(reinterpret_cast<const Scale*>(from + Kind::kScales));
      AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
        const F16 both = scales * broadcast(x.scales[at + r * x.groups]);
        sums[r][p] = multiply_add(to_float(dots[r][p].total()), both, sums[r][p]);
      }
      if constexpr (Kind::kHasMinimum) {
        const F16 minimums = load_scales(reinterpret_cast<const Scale*>(from + Kind::kMinimums));
        AERIE_UNROLL for (int r = 0; r < Rows; ++r)
          sums[r][p] =
              multiply_add(minimums, broadcast(x.scaled_sums[at + r * x.groups]), sums[r][p]);
      }
    }
  }

  AERIE_INLINE void add_group(const uint8_t* group, int64_t size, const GroupInputs& x, int64_t row,
                              int64_t g) {
    const int64_t at = row * x.groups + g;
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
      const int32_t first = -Kind::kZero * x.sums[at + r * x.groups];
      AERIE_UNROLL for (int p = 0; p < Panels; ++p) dots[r][p].start(first);
    }
    const int64_t first = row * x.K + g * Kind::kGroup;
    AERIE_UNROLL for (int j = 0; j < Kind::kLines; ++j)
      add_line(group + j * kLine, size, x, first + 4 * j);
    scale(group, size, x, at);
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

// Multiply the rows row .. row+Rows-1 by the panels from `panel` on.
template <class Kind, int Rows, int Panels>
void multiply_group_block(const GroupProduct& p, int64_t row, int64_t panel) {
  const int64_t size = Kind::panel_bytes(p.shape.K);
  const uint8_t* group = p.weight + panel * size;
  GroupBlock<Kind, Rows, Panels> block{};
  for (int64_t g = 0; g < p.x.groups; ++g, group += Kind::kBytes)
    block.add_group(group, size, p.x, row, g);
  AERIE_UNROLL for (int q = 0; q < Panels; ++q) {
    const int64_t column = (panel + q) * kPanel, columns = p.shape.N - column;
    const F16 offset = p.bias ? load_columns(p.bias + column, columns) : F16{};
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
      const F16 sum = block.sums[r][q];
      store_columns(p.out + (row + r) * p.stride + column, p.bias ? sum + offset : sum, columns);
    }
  }
}

template <class Kind, int Rows>
void multiply_group_rows(const GroupProduct& p, int64_t row, int64_t first, int64_t last) {
  constexpr int wide = group_panels_at_once(Rows);
  for (; first + wide <= last; first += wide) multiply_group_block<Kind, Rows, wide>(p, row, first);
  for (; first < last; ++first) multiply_group_block<Kind, Rows, 1>(p, row, first);
}

// Multiply `rows` rows from `row` on, at most kMaxGroupRows, by the panels first .. last-1.
template <class Kind, int Rows = 1>
void dispatch_group_rows(int64_t rows, const GroupProduct& p, int64_t row, int64_t first,
                         int64_t last) {
  if (rows == Rows) return multiply_group_rows<Kind, Rows>(p, row, first, last);
  if constexpr (Rows < kMaxGroupRows)
    dispatch_group_rows<Kind, Rows + 1>(rows, p, row, first, last);
}

}  // namespace aerie
