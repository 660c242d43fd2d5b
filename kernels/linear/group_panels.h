// The packed layout of a weight [N, K] that is quantised in groups of inputs:
//
//   weight[n, k] = scale[n, g] * (code[n, k] - kZero) + minimum[n, g]      g = k / kGroup
//
// Outputs are grouped in panels of 16 columns, a panel in groups of kGroup inputs. A group holds its
// codes, then sixteen scales, then sixteen minimums if it has any. Four codes of one output (a quad)
// fill a 32-bit lane, so that one 64-byte line feeds sixteen lanes of a dot product of bytes. Four-bit
// codes come two to a byte: line j holds quad j in the lower halves and quad j + kLines in the upper,
// so that one load and one shift feed two dot products. N is padded to a multiple of 16 with zeros.
#pragma once

#include <cstdint>

#include "../native/vector.h"
#include "panels.h"

namespace aerie {

constexpr int kLine = 64;  // bytes

// Bits: 4 or 8, per code. Group: inputs per scale. Scale: float, or uint16_t for a half.
// HasMinimum: whether groups have minimums; otherwise the code in the middle of the range is zero.
template <int Bits, int Group, class Scale, bool HasMinimum>
struct GroupKind {
  using ScaleType = Scale;
  static constexpr int kBits = Bits, kGroup = Group;
  static constexpr bool kHasMinimum = HasMinimum;
  static constexpr int kZero = HasMinimum ? 0 : 1 << (Bits - 1);
  static constexpr int kQuads = Group / 4;
  static constexpr int kLines = kQuads * Bits / 8;
  static constexpr int kScales = kLines * kLine;  // offset in bytes, as the next two
  static constexpr int kMinimums = kScales + kPanel * int(sizeof(Scale));
  static constexpr int kBytes = kMinimums + HasMinimum * kPanel * int(sizeof(Scale));  // a group

  static int64_t panel_bytes(int64_t K) { return K / Group * kBytes; }

  // Where in a group the code of (input k of the group, column n) lies.
  static int code_byte(int k, int n) { return k / 4 % kLines * kLine + n * 4 + k % 4; }
  static int code_shift(int k) { return k / 4 / kLines * Bits; }

  static int code(const uint8_t* group, int k, int n) {
    return group[code_byte(k, n)] >> code_shift(k) & ((1 << Bits) - 1);
  }
};

// A half as a float; infinities and NaN do not occur among scales.
AERIE_INLINE float widen_half(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13, sign = uint32_t(x & 0x8000) << 16;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;  // corrects the exponent's bias, also of subnormal numbers
  return sign ? -value : value;
}
AERIE_INLINE float widen_scale(float x) { return x; }
AERIE_INLINE float widen_scale(uint16_t x) { return widen_half(x); }

AERIE_INLINE F16 load_scales(const float* from) { return load(from); }

AERIE_INLINE F16 load_scales(const uint16_t* from) {
#if defined(__AVX512F__)
  F16 out;
  out.part[0] = (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return out;
#elif defined(__F16C__)
  F16 out;
  AERIE_EACH_PART out.part[i] =
      (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * kLanes)));
  return out;
#else
  float lanes[16];
  for (int n = 0; n < 16; ++n) lanes[n] = widen_half(from[n]);
  return load(lanes);
#endif
}

}  // namespace aerie
