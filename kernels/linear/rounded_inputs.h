// Inputs rounded to bfloat16, for kernels that multiply bfloat16 only.
#pragma once

#include "../native/vector.h"
#include "panels.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace aerie {

AERIE_INLINE void store_rounded(uint16_t* to, const float* from) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
  std::memcpy(to, &rounded, sizeof rounded);
#else
  store_halves(to, to_bfloat16(load(from)));
#endif
}

// Round a row in chunks of kTileK inputs, which begin `stride` elements apart; the last chunk is
// padded with zeros.
inline void round_row(const float* x, int64_t K, uint16_t* to, int64_t stride) {
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) store_rounded(to + k / kTileK * stride + k % kTileK, x + k);
  for (; k < round_up(K, kTileK); k += 16) {
    float last[16] = {};
    if (k < K) std::memcpy(last, x + k, (K - k) * sizeof(float));
    store_rounded(to + k / kTileK * stride + k % kTileK, last);
  }
}

}  // namespace aerie
