// Sixteen float lanes on any CPU: one AVX-512 register, two AVX2, four NEON or SSE registers.
// Written with the vector extensions of GCC and Clang, so that there is one source for all.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace aerie {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kParts = 16 / kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

// The same type for unaligned memory.
typedef float VecInMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t UVecInMemory __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef uint8_t LaneBytesInMemory __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint16_t HalfVecInMemory __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

#define AERIE_INLINE inline __attribute__((always_inline))
// Unroll loops over small arrays of vectors; otherwise the arrays lie in memory, not in registers.
#define AERIE_UNROLL _Pragma("GCC unroll 24")
#define AERIE_EACH_PART AERIE_UNROLL for (int i = 0; i < kParts; ++i)

struct F16 {
  Vec part[kParts];
};
struct U16 {
  UVec part[kParts];
};

AERIE_INLINE F16 broadcast(float x) {
  F16 out;
  AERIE_EACH_PART out.part[i] = x - Vec{};  // x + 0 would turn -0 into 0
  return out;
}

AERIE_INLINE U16 broadcast_bits(uint32_t x) {
  U16 out;
  AERIE_EACH_PART out.part[i] = UVec{} + x;
  return out;
}

AERIE_INLINE F16 load(const float* from) {
  F16 out;
  AERIE_EACH_PART out.part[i] = *reinterpret_cast<const VecInMemory*>(from + i * kLanes);
  return out;
}

AERIE_INLINE void store(float* to, F16 x) {
  AERIE_EACH_PART *reinterpret_cast<VecInMemory*>(to + i * kLanes) = x.part[i];
}

// Sixteen pairs of 16-bit numbers.
AERIE_INLINE U16 load_pairs(const uint16_t* from) {
  U16 out;
  AERIE_EACH_PART out.part[i] = *reinterpret_cast<const UVecInMemory*>(from + i * 2 * kLanes);
  return out;
}

AERIE_INLINE F16 operator+(F16 a, F16 b) {
  AERIE_EACH_PART a.part[i] += b.part[i];
  return a;
}

AERIE_INLINE F16 operator-(F16 a, F16 b) {
  AERIE_EACH_PART a.part[i] -= b.part[i];
  return a;
}

AERIE_INLINE F16 operator*(F16 a, F16 b) {
  AERIE_EACH_PART a.part[i] *= b.part[i];
  return a;
}

AERIE_INLINE F16 operator/(F16 a, F16 b) {
  AERIE_EACH_PART a.part[i] /= b.part[i];
  return a;
}

// a * b + c; fused where the CPU can (-ffp-contract=fast).
AERIE_INLINE F16 multiply_add(F16 a, F16 b, F16 c) {
  AERIE_EACH_PART c.part[i] = a.part[i] * b.part[i] + c.part[i];
  return c;
}

AERIE_INLINE F16 maximum(F16 a, F16 b) {
  AERIE_EACH_PART a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}

// bfloat16 is the upper half of a float.
AERIE_INLINE F16 upper_halves(U16 bits) {
  F16 out;
  AERIE_EACH_PART out.part[i] = (Vec)(bits.part[i] & 0xffff0000u);
  return out;
}

AERIE_INLINE F16 lower_halves(U16 bits) {
  F16 out;
  AERIE_EACH_PART out.part[i] = (Vec)(bits.part[i] << 16);
  return out;
}

AERIE_INLINE F16 load(const uint16_t* from) {
  U16 bits;
  AERIE_EACH_PART {
    const HalfVec half = *reinterpret_cast<const HalfVecInMemory*>(from + i * kLanes);
    bits.part[i] = __builtin_convertvector(half, UVec);
  }
  return lower_halves(bits);
}

AERIE_INLINE float widen(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

AERIE_INLINE float widen(float x) { return x; }

// 8-bit floating-point numbers with three bits of mantissa (float8_e4m3fn): 2^-9 to 448 and NaN.
enum class Fp8 : uint8_t {};

AERIE_INLINE F16 load(const Fp8* from) {
  F16 out;
  AERIE_EACH_PART {
    const LaneBytes bytes = *reinterpret_cast<const LaneBytesInMemory*>(from + i * kLanes);
    const UVec bits = __builtin_convertvector(bytes, UVec);
    const UVec size = bits & 0x7fu;
    const Vec normal = (Vec)((size << 20) + (120u << 23));
    const Vec subnormal = __builtin_convertvector((IVec)size, Vec) * (1.0f / 512.0f);
    Vec x = size < 8u ? subnormal : normal;
    x = size == 0x7fu ? Vec{} + __builtin_nanf("") : x;
    out.part[i] = (Vec)((UVec)x | ((bits & 0x80u) << 24));
  }
  return out;
}

AERIE_INLINE float widen(Fp8 number) {
  const uint32_t bits = static_cast<uint8_t>(number), size = bits & 0x7fu;
  uint32_t whole = (size << 20) + (120u << 23);
  float x;
  std::memcpy(&x, &whole, sizeof x);
  if (size < 8u) x = static_cast<float>(size) * (1.0f / 512.0f);
  if (size == 0x7fu) x = __builtin_nanf("");
  return bits & 0x80u ? -x : x;
}

// Round to nearest, ties to even; NaN stays NaN.
AERIE_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

AERIE_INLINE void narrow(float x, uint16_t* to) { *to = to_bfloat16(x); }
AERIE_INLINE void narrow(float x, float* to) { *to = x; }

// To the nearest, ties to even; what is too large becomes 448. NaN stays NaN.
AERIE_INLINE void narrow(float x, Fp8* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80u;
  float size = x < 0 ? -x : x;
  size = size > 448.0f ? 448.0f : size;
  std::memcpy(&bits, &size, sizeof bits);
  uint32_t found = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  // Below 2^-6 numbers are 2^-9 apart, as those from 2^14 to 2^15 are in float.
  if (size < 0.015625f) found = static_cast<uint32_t>(((size + 16384.0f) - 16384.0f) * 512.0f);
  if (x != x) found = 0x7fu;
  *to = static_cast<Fp8>(sign | found);
}

// The same rounding per lane; the result is in the lower half of each lane.
AERIE_INLINE U16 to_bfloat16(F16 x) {
  U16 out;
  AERIE_EACH_PART {
    const UVec bits = (UVec)x.part[i];
    const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.part[i] = x.part[i] == x.part[i] ? rounded : UVec{} + 0x7fc0u;
  }
  return out;
}

AERIE_INLINE void store_halves(uint16_t* to, U16 bits) {
  AERIE_EACH_PART {
    const HalfVec half = __builtin_convertvector(bits.part[i], HalfVec);
    *reinterpret_cast<HalfVecInMemory*>(to + i * kLanes) = half;
  }
}

// Lane k of the result is from `x` where k < count, else from `other`.
AERIE_INLINE F16 first_lanes(F16 x, int count, F16 other) {
  AERIE_EACH_PART {
    IVec lane;
    AERIE_UNROLL for (int k = 0; k < kLanes; ++k) lane[k] = i * kLanes + k;
    x.part[i] = lane < count ? x.part[i] : other.part[i];
  }
  return x;
}

// Lane k of the result is from `x` where bit k of `mask` is set, else from `other`.
AERIE_INLINE F16 masked_lanes(F16 x, uint32_t mask, F16 other) {
  AERIE_EACH_PART {
    UVec bit;
    AERIE_UNROLL for (int k = 0; k < kLanes; ++k) bit[k] = 1u << (i * kLanes + k);
    x.part[i] = (bit & mask) != 0 ? x.part[i] : other.part[i];
  }
  return x;
}

// Lane k of the result is lane k + Shift of x, cyclically.
template <int Shift, class V, size_t... Lane>
AERIE_INLINE V rotated(V x, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(x, x, (int(Lane + Shift) % kLanes)...);
}

// Combine all lanes in halves: lane k with lane k + 8, then k + 4, and so on.
template <int Width, class V, class Combine>
AERIE_INLINE V halve(V x, Combine combine) {
  if constexpr (Width == 0) return x;
  else
    return halve<Width / 2>(combine(x, rotated<Width>(x, std::make_index_sequence<kLanes>{})),
                            combine);
}

// All sixteen lanes combined.
template <class Lanes, class Combine>
AERIE_INLINE auto combine_lanes(Lanes x, Combine combine) {
  AERIE_UNROLL for (int parts = kParts / 2; parts > 0; parts /= 2)
    AERIE_UNROLL for (int i = 0; i < parts; ++i)
      x.part[i] = combine(x.part[i], x.part[i + parts]);
  return halve<kLanes / 2>(x.part[0], combine)[0];
}

AERIE_INLINE float sum_lanes(F16 x) {
  return combine_lanes(x, [](Vec a, Vec b) { return a + b; });
}

AERIE_INLINE float maximum_of_lanes(F16 x) {
  return combine_lanes(x, [](Vec a, Vec b) { return a > b ? a : b; });
}

// e^x, about 1 ulp; 0 below -87 (so also for -inf), finite above 88.
// Cody-Waite reduction to |r| <= ln(2) / 2, then the Taylor polynomial of degree 7.
AERIE_INLINE F16 exponential(F16 x) {
  AERIE_EACH_PART {
    const Vec whole = x.part[i];
    Vec v = whole < -87.0f ? Vec{} - 87.0f : whole;
    v = v > 88.0f ? Vec{} + 88.0f : v;
    const Vec shifted = v * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to integer
    const Vec n = shifted - 12582912.0f;
    Vec r = v - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
    p = p * r + (1.0f / 120.0f);
    p = p * r + (1.0f / 24.0f);
    p = p * r + (1.0f / 6.0f);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
    const Vec result = p * (Vec)power;
    x.part[i] = whole < -87.0f ? Vec{} : result;
  }
  return x;
}

// ---- sums over the lanes of sixteen vectors at once --------------------------------------------

// One folding stage: `a` and `b` consist of segments of 2 * Half lanes; each segment is folded to
// Half lanes, with those of `a` first.
template <int Half, size_t... Lane>
AERIE_INLINE Vec fold(Vec a, Vec b, std::index_sequence<Lane...>) {
  constexpr int segment = 2 * Half;
  return __builtin_shufflevector(a, b, (int(Lane) / Half * segment + int(Lane) % Half)...) +
         __builtin_shufflevector(a, b, (int(Lane) / Half * segment + int(Lane) % Half + Half)...);
}

// Fold `Count` vectors with segments of 2 * Half lanes, pair by pair, until one is left.
template <int Half, int Count>
AERIE_INLINE void fold_all(Vec* v) {
  AERIE_UNROLL for (int k = 0; k < Count / 2; ++k)
    v[k] = fold<Half>(v[2 * k], v[2 * k + 1], std::make_index_sequence<kLanes>{});
  if constexpr (Half > 1) fold_all<Half / 2, Count / 2>(v);
}

// Lane k of the result is the sum over the lanes of v[k].
AERIE_INLINE F16 sum_each(const F16 (&v)[16]) {
  F16 out;
  AERIE_EACH_PART {
    Vec group[kLanes];
    AERIE_UNROLL for (int k = 0; k < kLanes; ++k) {
      group[k] = v[i * kLanes + k].part[0];
      AERIE_UNROLL for (int p = 1; p < kParts; ++p) group[k] += v[i * kLanes + k].part[p];
    }
    fold_all<kLanes / 2, kLanes>(group);
    out.part[i] = group[0];
  }
  return out;
}

}  // namespace aerie
