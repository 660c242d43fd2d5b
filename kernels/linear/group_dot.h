// Dot products of bytes: sixteen lanes, each the sum of (code - zero) * input over a group.
//
// Codes are unsigned, inputs signed. All sums are exact integers, so every CPU gets the same.
#pragma once

#include "../native/vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace aerie {

struct I16 {
  IVec part[kParts];
};

AERIE_INLINE I16 broadcast_int(int32_t x) {
  I16 out;
  AERIE_EACH_PART out.part[i] = IVec{} + x;
  return out;
}

AERIE_INLINE F16 to_float(I16 x) {
  F16 out;
  AERIE_EACH_PART out.part[i] = __builtin_convertvector(x.part[i], Vec);
  return out;
}

typedef int32_t IVecInMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// A line: a quad of unsigned bytes per lane.
AERIE_INLINE I16 load_line(const uint8_t* from) {
  I16 out;
  AERIE_EACH_PART out.part[i] = *reinterpret_cast<const IVecInMemory*>(from + i * 4 * kLanes);
  return out;
}

AERIE_INLINE void store_line(uint8_t* to, I16 line) {
  AERIE_EACH_PART *reinterpret_cast<IVecInMemory*>(to + i * 4 * kLanes) = line.part[i];
}

AERIE_INLINE I16 lower_codes(I16 line) {
  AERIE_EACH_PART line.part[i] &= 0x0f0f0f0f;
  return line;
}

AERIE_INLINE I16 upper_codes(I16 line) {
  AERIE_EACH_PART line.part[i] = (line.part[i] >> 4) & 0x0f0f0f0f;
  return line;
}

// How one part of the lanes is multiplied: `sums` is what is summed up over a group. `Bits` bounds
// the codes: below 16, or below 256.
struct IntSums {
  IVec sums;
  AERIE_INLINE void start(int32_t first) { sums = IVec{} + first; }
  AERIE_INLINE IVec total() const { return sums; }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

template <int Bits>
struct PartDot : IntSums {
  AERIE_INLINE void add(IVec codes, int32_t quad) {
#if defined(__AVX512VNNI__)
    sums = (IVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(quad));
#else
    sums = (IVec)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(quad));
#endif
  }
};

#elif defined(__AVX2__)

#if defined(__AVX512BW__)
#define AERIE_BYTES(name) _mm512_##name
typedef __m512i ByteVec;
#else
#define AERIE_BYTES(name) _mm256_##name
typedef __m256i ByteVec;
#endif

template <int Bits>
struct PartDot;

// Sixteen-bit sums of a whole group fit: 8 quads * 2 products * 15 * 128 < 2^15.
template <>
struct PartDot<4> {
  IVec sums;
  int32_t first;
  AERIE_INLINE void start(int32_t from) { sums = IVec{}, first = from; }
  AERIE_INLINE void add(IVec codes, int32_t quad) {
    const ByteVec products = AERIE_BYTES(maddubs_epi16)((ByteVec)codes, AERIE_BYTES(set1_epi32)(quad));
    sums = (IVec)AERIE_BYTES(add_epi16)((ByteVec)sums, products);
    asm("" : "+v"(sums));  // otherwise GCC adds all products at the end, and keeps them in memory
  }
  AERIE_INLINE IVec total() const {
    return (IVec)AERIE_BYTES(madd_epi16)((ByteVec)sums, AERIE_BYTES(set1_epi16)(1)) + first;
  }
};

// The halves of each code are multiplied apart, as products of whole codes overflow sixteen bits.
template <>
struct PartDot<8> {
  PartDot<4> lower, upper;
  AERIE_INLINE void start(int32_t first) { lower.start(first), upper.start(0); }
  AERIE_INLINE void add(IVec codes, int32_t quad) {
    lower.add(codes & 0x0f0f0f0f, quad);
    upper.add((codes >> 4) & 0x0f0f0f0f, quad);
  }
  AERIE_INLINE IVec total() const { return lower.total() + (upper.total() << 4); }
};

#elif defined(__ARM_FEATURE_DOTPROD)

// Both operands are signed: codes of eight bits are multiplied less 128, and 128 times the inputs is
// added in two steps.
template <int Bits>
struct PartDot {
  int32x4_t sums;
  AERIE_INLINE void start(int32_t first) { sums = vdupq_n_s32(first); }
  AERIE_INLINE void add(IVec codes, int32_t quad) {
    int8x16_t bytes = vreinterpretq_s8_s32((int32x4_t)codes);
    const int8x16_t broadcast = vreinterpretq_s8_s32(vdupq_n_s32(quad));
    if constexpr (Bits == 8) {
      bytes = veorq_s8(bytes, vdupq_n_s8(-128));
      sums = vdotq_s32(sums, vdupq_n_s8(127), broadcast);
      sums = vdotq_s32(sums, vdupq_n_s8(1), broadcast);
    }
    sums = vdotq_s32(sums, bytes, broadcast);
  }
  AERIE_INLINE IVec total() const { return (IVec)sums; }
};

#else

template <int Bits>
struct PartDot : IntSums {
  AERIE_INLINE void add(IVec codes, int32_t quad) {
    AERIE_UNROLL for (int b = 0; b < 4; ++b)
      sums += ((codes >> (8 * b)) & 0xff) * int32_t(int8_t(quad >> (8 * b)));
  }
};

#endif

template <int Bits>
struct Dot {
  PartDot<Bits> part[kParts];

  AERIE_INLINE void start(int32_t first) { AERIE_EACH_PART part[i].start(first); }
  AERIE_INLINE void add(I16 codes, int32_t quad) {
    AERIE_EACH_PART part[i].add(codes.part[i], quad);
  }
  AERIE_INLINE I16 total() const {
    I16 out;
    AERIE_EACH_PART out.part[i] = part[i].total();
    return out;
  }
};

}  // namespace aerie
