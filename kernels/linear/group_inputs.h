// Inputs of a product with a grouped weight: codes of one or two bytes with one scale per 32 inputs
// of a row.
//
//   x[k] is about scale * code[k],  scale = max |x| / kMaxCode over the 32 inputs
//   one byte:   code = high
//   two bytes:  code = 256 * high + low, both signed
//
// Each byte is multiplied by itself. One byte is what llama.cpp uses: enough for a product, but the
// errors of 120 products in a row change now and then what SmolLM2 answers. With two bytes it answers
// as in float32; where memory is the limit they cost little, elsewhere twice as much.
// The scale of a group with an infinity or a NaN is NaN, so that every output of that row is NaN.
#pragma once

#include <cmath>
#include <limits>

#include "group_dot.h"

namespace aerie {

constexpr int kInputGroup = 32;

template <int Bytes>
constexpr int kMaxCode = Bytes == 1 ? 127 : 127 * 256 + 127;

// Rows of each byte [M, K] (`low` is null with one), and per group of the weight the scale, the sum of the codes, and the
// scaled sum of the codes, each [M, groups].
struct GroupInputs {
  int8_t *high, *low;
  float* scales;
  int32_t* sums;
  float* scaled_sums;
  int64_t K, groups;
};

// The largest magnitude of 32 numbers, as bits; a NaN is larger than infinity.
AERIE_INLINE int32_t largest_bits(const float* x) {
  I16 largest{};
  for (int k = 0; k < kInputGroup; k += 16) {
    const F16 v = load(x + k);
    AERIE_EACH_PART {
      const IVec bits = (IVec)v.part[i] & 0x7fffffff;
      largest.part[i] = bits > largest.part[i] ? bits : largest.part[i];
    }
  }
  return combine_lanes(largest, [](IVec a, IVec b) { return a > b ? a : b; });
}

// Write the bytes of 32 codes and the sums of both halves of the codes; return the codes' scale.
template <int Bytes>
float quantise_group(const float* x, int8_t* high, int8_t* low, int32_t (&sums)[2]) {
  const int32_t bits = largest_bits(x);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  if (bits >= 0x7f800000 || largest < 1e-30f) {
    std::memset(high, 0, kInputGroup);
    if constexpr (Bytes == 2) std::memset(low, 0, kInputGroup);
    sums[0] = sums[1] = 0;
    return bits >= 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  }
  typedef int8_t ByteLanes __attribute__((vector_size(kLanes)));
  const F16 inverse = broadcast(kMaxCode<Bytes> / largest), magic = broadcast(12582912.0f);  // 1.5 * 2^23
  for (int half = 0; half < 2; ++half) {
    const int k = 16 * half;
    const F16 rounded = load(x + k) * inverse + magic;  // its low bits are the rounded integer
    I16 codes;
    AERIE_EACH_PART {
      codes.part[i] = (IVec)rounded.part[i] - 0x4b400000;
      IVec upper = codes.part[i];
      if constexpr (Bytes == 2) {
        upper = (codes.part[i] + 128) >> 8;
        const ByteLanes lows = __builtin_convertvector(codes.part[i] - (upper << 8), ByteLanes);
        std::memcpy(low + k + i * kLanes, &lows, sizeof lows);
      }
      const ByteLanes highs = __builtin_convertvector(upper, ByteLanes);
      std::memcpy(high + k + i * kLanes, &highs, sizeof highs);
    }
    sums[half] = combine_lanes(codes, [](IVec a, IVec b) { return a + b; });
  }
  return largest / kMaxCode<Bytes>;
}

template <int Group, int Bytes>
void quantise_row(const float* x, int64_t row, const GroupInputs& to) {
  static_assert(Group == kInputGroup || Group * 2 == kInputGroup);
  int8_t *high = to.high + row * to.K, *low = to.low + row * to.K;
  int64_t at = row * to.groups;
  for (int64_t k = 0; k < to.K; k += kInputGroup) {
    int32_t sums[2];
    const float scale = quantise_group<Bytes>(x + k, high + k, low + k, sums);
    if (Group == kInputGroup) sums[0] += sums[1];
    for (int i = 0; i < kInputGroup / Group; ++i, ++at)
      to.scales[at] = scale, to.sums[at] = sums[i], to.scaled_sums[at] = scale * float(sums[i]);
  }
}

}  // namespace aerie
