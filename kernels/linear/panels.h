// The packed layout of a weight [N, K], shared by all linear kernels.
//
// Outputs are grouped in panels of 16 columns. A bfloat16 panel holds, for each pair of inputs
// (2p, 2p + 1), sixteen 32-bit words: the weight of input 2p in the lower half, of 2p + 1 in the
// upper. One 64-byte line thus feeds sixteen lanes for two inputs, and sixteen lines are one tile
// of Intel AMX. A float32 panel holds sixteen floats per input. Padding is zero: K to a multiple
// of 32 (bfloat16), N to a multiple of 16.
#pragma once

#include <cstdint>

namespace aerie {

constexpr int kPanel = 16;    // columns
constexpr int kTileK = 32;    // inputs per tile
constexpr int kTileRows = 16;

AERIE_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

AERIE_INLINE int64_t num_panels(int64_t N) { return round_up(N, kPanel) / kPanel; }

// Elements of one panel.
AERIE_INLINE int64_t panel_size(const float*, int64_t K) { return K * kPanel; }
AERIE_INLINE int64_t panel_size(const uint16_t*, int64_t K) {
  return round_up(K, kTileK) * kPanel;
}

// Where the weight of (input k, column n of the panel) lies.
AERIE_INLINE int64_t panel_index(const float*, int64_t k, int n) { return k * kPanel + n; }
AERIE_INLINE int64_t panel_index(const uint16_t*, int64_t k, int n) {
  return (k / 2 * kPanel + n) * 2 + k % 2;
}

}  // namespace aerie
