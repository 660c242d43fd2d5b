// x [M, K] float32 times a packed weight, on vector registers.
//
// Every output is summed in chains of kChain multiply-adds over k = 0, 1, 2, ...; the chains are
// added in order. So its value does not depend on the number of rows, on the block sizes below, or
// on the thread that computes it. (Errors grow with a chain's length, so one long chain would lose
// accuracy.)

#pragma once

#include "../native/vector.h"
#include "panels.h"

namespace aerie {

// Accumulators that fit the register file beside weights and inputs.
constexpr int kAccumulators = kLanes == 16 ? 24 : 6;
constexpr int kMaxPanels = kLanes == 16 ? 8 : 4;
constexpr int kMaxRows = kLanes == 16 ? 12 : 6;

constexpr int64_t kChain = 32;  // even, so that a pair of inputs stays in one chain

constexpr int panels_at_once(int rows) {
  int panels = kMaxPanels;
  while (panels > 1 && panels * rows > kAccumulators) panels /= 2;
  return panels;
}

struct LinearShape {
  int64_t M, K, N;
};

// Rows of a block next to each other: inputs[k * rows + r] = x[r * K + k], so that the kernel below
// needs one pointer for all of them.
AERIE_INLINE void interleave_rows(const float* x, int64_t rows, int64_t K, float* inputs) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < K; ++k) inputs[k * rows + r] = x[r * K + k];
}

template <int Rows, int Panels>
struct Accumulators {
  F16 sum[Rows][Panels];

  // Add the products of one input of every row.
  AERIE_INLINE void add(const float* inputs, const F16 (&weights)[Panels]) {
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
      const F16 input = broadcast(inputs[r]);
      AERIE_UNROLL for (int p = 0; p < Panels; ++p)
        sum[r][p] = multiply_add(input, weights[p], sum[r][p]);
    }
  }

  AERIE_INLINE void operator+=(const Accumulators& other) {
    AERIE_UNROLL for (int r = 0; r < Rows; ++r)
      AERIE_UNROLL for (int p = 0; p < Panels; ++p) sum[r][p] = sum[r][p] + other.sum[r][p];
  }

  AERIE_INLINE void add_all(const float* inputs, int64_t K, const float* panel, int64_t size) {
    for (int64_t k = 0; k < K; ++k, inputs += Rows, panel += kPanel) {
      F16 weights[Panels];
      AERIE_UNROLL for (int p = 0; p < Panels; ++p) weights[p] = load(panel + p * size);
      add(inputs, weights);
    }
  }

  AERIE_INLINE void add_all(const float* inputs, int64_t K, const uint16_t* panel, int64_t size) {
    for (int64_t k = 0; k < K; k += 2, inputs += 2 * Rows, panel += 2 * kPanel) {
      U16 pairs[Panels];
      F16 weights[Panels];
      AERIE_UNROLL for (int p = 0; p < Panels; ++p) {
        pairs[p] = load_pairs(panel + p * size);
        weights[p] = lower_halves(pairs[p]);
      }
      add(inputs, weights);
      if (k + 1 == K) return;
      AERIE_UNROLL for (int p = 0; p < Panels; ++p) weights[p] = upper_halves(pairs[p]);
      add(inputs + Rows, weights);
    }
  }
};

// Write the first `columns` lanes.
AERIE_INLINE void store_columns(float* out, F16 values, int64_t columns) {
  if (columns >= kPanel) return store(out, values);
  float lanes[kPanel];
  store(lanes, values);
  std::memcpy(out, lanes, columns * sizeof(float));
}

AERIE_INLINE F16 load_columns(const float* from, int64_t columns) {
  float lanes[kPanel] = {};
  std::memcpy(lanes, from, (columns < kPanel ? columns : kPanel) * sizeof(float));
  return load(lanes);
}

template <int Rows, int Panels, class W>
void multiply_block(const LinearShape& shape, const float* inputs, const W* weight,
                    const float* bias, float* out, int64_t first_column) {
  const int64_t K = shape.K, size = panel_size(weight, K);
  Accumulators<Rows, Panels> acc{};
  for (int64_t k = 0; k < K; k += kChain) {
    Accumulators<Rows, Panels> chain{};
    chain.add_all(inputs + k * Rows, K - k < kChain ? K - k : kChain, weight + k * kPanel, size);
    acc += chain;
  }
  AERIE_UNROLL for (int p = 0; p < Panels; ++p) {
    const int64_t column = first_column + p * kPanel, columns = shape.N - column;
    const F16 offset = bias ? load_columns(bias + column, columns) : F16{};
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
      const F16 sum = acc.sum[r][p];
      store_columns(out + r * shape.N + column, bias ? sum + offset : sum, columns);
    }
  }
}

// Multiply Rows rows by the panels first .. last-1.
template <int Rows, class W>
void multiply_rows(const LinearShape& shape, const float* inputs, const W* weight, const float* bias,
                   float* out, int64_t first, int64_t last) {
  constexpr int wide = panels_at_once(Rows);
  const int64_t size = panel_size(weight, shape.K);
  for (; first + wide <= last; first += wide)
    multiply_block<Rows, wide>(shape, inputs, weight + first * size, bias, out, first * kPanel);
  for (; first < last; ++first)
    multiply_block<Rows, 1>(shape, inputs, weight + first * size, bias, out, first * kPanel);
}

template <class W, int Rows = 1>
void dispatch_rows(int rows, const LinearShape& shape, const float* inputs, const W* weight,
                   const float* bias, float* out, int64_t first, int64_t last) {
  if (rows == Rows) return multiply_rows<Rows>(shape, inputs, weight, bias, out, first, last);
  if constexpr (Rows < kMaxRows)
    dispatch_rows<W, Rows + 1>(rows, shape, inputs, weight, bias, out, first, last);
}

// Rows are processed in blocks of nearly equal size, at most kMaxRows.
AERIE_INLINE int64_t num_row_blocks(int64_t M) { return (M + kMaxRows - 1) / kMaxRows; }
AERIE_INLINE int64_t first_row(int64_t block, int64_t M) { return M * block / num_row_blocks(M); }

// Multiply all row blocks (interleaved, one after the other) by the panels first .. last-1.
template <class W>
void multiply_panels(const LinearShape& shape, const float* inputs, const W* weight,
                     const float* bias, float* out, int64_t first, int64_t last) {
  for (int64_t b = 0; b < num_row_blocks(shape.M); ++b) {
    const int64_t row = first_row(b, shape.M);
    const int rows = static_cast<int>(first_row(b + 1, shape.M) - row);
    dispatch_rows<W>(rows, shape, inputs + row * shape.K, weight, bias, out + row * shape.N, first,
                     last);
  }
}

}  // namespace aerie
