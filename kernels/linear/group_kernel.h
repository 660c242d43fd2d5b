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
constexpr int kMaxGroupRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 2;

// With more rows than these the hardware does not read far enough ahead by itself; with few it does
// better alone, if the instructions for a line are as few as with AVX-512.
constexpr int kUnhurriedGroupRows = kLanes == 16 ? 4 : 0;
constexpr int kReadAhead = 2048;  // bytes

AERIE_INLINE int32_t load_quad(const int8_t* from) {
  int32_t quad;
  std::memcpy(&quad, from, sizeof quad);
  return quad;
}

// The dot products with inputs of so many bytes.
template <int Bits, int Bytes>
struct InputDot;

template <int Bits>
struct InputDot<Bits, 1> : Dot<Bits> {
  AERIE_INLINE void add(I16 codes, const int8_t* high, const int8_t*) {
    Dot<Bits>::add(codes, load_quad(high));
  }
};

template <int Bits>
struct InputDot<Bits, 2> {
  Dot<Bits> high, low;

  AERIE_INLINE void start(int32_t first) { high.start(0), low.start(first); }
  AERIE_INLINE void add(I16 codes, const int8_t* upper, const int8_t* lower) {
    high.add(codes, load_quad(upper));
    low.add(codes, load_quad(lower));
  }
  AERIE_INLINE I16 total() const {
    I16 sum = low.total();
    const I16 upper = high.total();
    AERIE_EACH_PART sum.part[i] += upper.part[i] << 8;
    return sum;
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

// The outputs of a panel: the scaled sums of all groups so far.
template <class Kind, int Rows>
struct ScaledSums {
  F16 sums[Rows];

  // Add a group; `total(r)` is the integer sum of row r, `at` the group's place among those of the
  // inputs, of row 0.
  template <class Total>
  AERIE_INLINE void add(const uint8_t* group, const GroupInputs& x, int64_t at, const Total& total) {
    using Scale = typename Kind::ScaleType;
    const F16 scales = load_scales(reinterpret_cast<const Scale*>(group + Kind::kScales));
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
      const F16 both = scales * broadcast(x.scales[at + r * x.groups]);
      sums[r] = multiply_add(to_float(total(r)), both, sums[r]);
    }
    if constexpr (Kind::kHasMinimum) {
      const F16 minimums = load_scales(reinterpret_cast<const Scale*>(group + Kind::kMinimums));
      AERIE_UNROLL for (int r = 0; r < Rows; ++r)
        sums[r] = multiply_add(minimums, broadcast(x.scaled_sums[at + r * x.groups]), sums[r]);
    }
  }

  // Write the rows from `row` on.
  AERIE_INLINE void write(const GroupProduct& p, int64_t row, int64_t panel) const {
    const int64_t column = panel * kPanel, columns = p.shape.N - column;
    const F16 offset = p.bias ? load_columns(p.bias + column, columns) : F16{};
    AERIE_UNROLL for (int r = 0; r < Rows; ++r)
      store_columns(p.out + (row + r) * p.stride + column, p.bias ? sums[r] + offset : sums[r],
                    columns);
  }
};

// The dot products of one group, with the same codes for all rows.
template <class Kind, int Bytes, int Rows>
struct GroupDots {
  InputDot<Kind::kBits, Bytes> dots[Rows];

  // `at`: the group's first input of row 0.
  AERIE_INLINE void multiply(const uint8_t* group, const GroupInputs& x, int64_t at) {
    AERIE_UNROLL for (int j = 0; j < Kind::kLines; ++j)
      add_line(group + j * kLine, x, at + 4 * j);
  }

 private:
  AERIE_INLINE void add_line(const uint8_t* from, const GroupInputs& x, int64_t at) {
    if constexpr (Rows > kUnhurriedGroupRows) __builtin_prefetch(from + kReadAhead);
    const I16 line = load_line(from);
    if constexpr (Kind::kBits == 8) return add_quad(line, x, at);
    add_quad(lower_codes(line), x, at);
    add_quad(upper_codes(line), x, at + Kind::kLines * 4);
  }

  AERIE_INLINE void add_quad(I16 codes, const GroupInputs& x, int64_t at) {
    AERIE_UNROLL for (int r = 0; r < Rows; ++r, at += x.K)
      dots[r].add(codes, x.high + at, Bytes == 2 ? x.low + at : nullptr);
  }
};

// Multiply the rows row .. row+Rows-1 by one panel.
template <class Kind, int Bytes, int Rows>
void multiply_panel(const GroupProduct& p, int64_t row, int64_t panel) {
  const GroupInputs& x = p.x;
  const uint8_t* group = p.weight + panel * Kind::panel_bytes(p.shape.K);
  ScaledSums<Kind, Rows> sums{};
  for (int64_t g = 0; g < x.groups; ++g, group += Kind::kBytes) {
    const int64_t at = row * x.groups + g;
    GroupDots<Kind, Bytes, Rows> block;
    AERIE_UNROLL for (int r = 0; r < Rows; ++r)
      block.dots[r].start(-Kind::kZero * x.sums[at + r * x.groups]);
    block.multiply(group, x, row * x.K + g * Kind::kGroup);
    sums.add(group, x, at, [&](int r) { return block.dots[r].total(); });
  }
  sums.write(p, row, panel);
}

// Multiply `rows` rows from `row` on, at most kMaxGroupRows, by the panels first .. last-1.
template <class Kind, int Bytes, int Rows = 1>
void multiply_panels(int64_t rows, const GroupProduct& p, int64_t row, int64_t first, int64_t last) {
  if (rows == Rows) {
    for (int64_t panel = first; panel < last; ++panel) multiply_panel<Kind, Bytes, Rows>(p, row, panel);
    return;
  }
  if constexpr (Rows < kMaxGroupRows)
    multiply_panels<Kind, Bytes, Rows + 1>(rows, p, row, first, last);
}

}  // namespace aerie
