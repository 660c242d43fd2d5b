// Draws from logits. The integers of the noise equal those of reference.py bit for bit.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../native/pool.h"
#include "../native/vector.h"

namespace aerie {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr uint32_t kGolden = 0x9E3779B1u;

// The murmur3 finaliser.
template <class Word>
AERIE_INLINE Word finalise(Word x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

struct Key {
  uint32_t low, high;
};

template <class Word>
AERIE_INLINE Word noise_bits(Word token, Key key) {
  return finalise(finalise(token * kGolden + key.low) ^ key.high);
}

// -log(-log(1 - v)), v = (bits + 1/2) / 2^32, as in reference.py.
float gumbel(uint32_t bits) {
  const float v = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  return -std::log(-std::log1p(-std::min(v, 1.0f - 0x1p-24f)));
}

// Token ids token .. token+15.
AERIE_INLINE U16 token_ids(uint32_t token) {
  U16 ids;
  AERIE_EACH_PART {
    UVec lane;
    AERIE_UNROLL for (int k = 0; k < kLanes; ++k) lane[k] = i * kLanes + k;
    ids.part[i] = lane + token;
  }
  return ids;
}

// Whether any lane of x is true (-1).
AERIE_INLINE bool any(IVec x) {
  int32_t found = 0;
  for (int k = 0; k < kLanes; ++k) found |= x[k];
  return found != 0;
}

int64_t argmax(const float* logits, int64_t V) {
  F16 highest = broadcast(kMinusInfinity);
  int64_t v = 0;
  for (; v + 16 <= V; v += 16) highest = maximum(highest, load(logits + v));
  float best = maximum_of_lanes(highest);
  for (; v < V; ++v) best = std::max(best, logits[v]);
  for (v = 0; v < V; ++v)
    if (logits[v] == best) return v;
  return 0;
}

struct Draw {
  const float* logits;
  Key key;
  int64_t token;
  float best;

  void consider(int64_t candidate) {
    if (logits[candidate] == kMinusInfinity) return;
    const float value =
        logits[candidate] + gumbel(noise_bits(static_cast<uint32_t>(candidate), key));
    if (value > best || (value == best && candidate < token)) {
      best = value;
      token = candidate;
    }
  }
};

// A token can only win with noise g >= best - logit, that is, v <= 1 - exp(-exp(-g)) <= exp(-g).

// This bound costs one exponential per token; only tokens that pass it need the two logarithms.

int64_t gumbel_argmax(const float* logits, int64_t V, Key key) {
  const int64_t top = argmax(logits, V);
  Draw draw{logits, key, top, kMinusInfinity};
  draw.consider(top);
  const F16 slack = broadcast(1.0f + 1e-4f), unit = broadcast(0x1p-32f);
  int64_t v = 0;
  for (; v + 16 <= V; v += 16) {
    const F16 bound = exponential(load(logits + v) - broadcast(draw.best)) * slack + unit;
    const U16 ids = token_ids(static_cast<uint32_t>(v));
    bool hopeful = false;
    AERIE_EACH_PART {
      const Vec uniform = __builtin_convertvector(noise_bits(ids.part[i], key), Vec) * 0x1p-32f;
      hopeful |= any(uniform <= bound.part[i]);
    }
    if (hopeful)
      for (int64_t k = v; k < v + 16; ++k) draw.consider(k);
  }
  for (; v < V; ++v) draw.consider(v);
  return draw.token;
}

float logsumexp(const float* logits, int64_t V) {
  const float highest = logits[argmax(logits, V)];
  if (highest == kMinusInfinity) return kMinusInfinity;
  const F16 shift = broadcast(highest);
  double total = 0;
  F16 sum{};
  int64_t v = 0;
  for (; v + 16 <= V; v += 16) {
    sum = sum + exponential(load(logits + v) - shift);
    if (v % 4096 == 0) {  // short chains of float sums keep the error small
      total += sum_lanes(sum);
      sum = F16{};
    }
  }
  total += sum_lanes(sum);
  for (; v < V; ++v) total += std::exp(logits[v] - highest);
  return highest + static_cast<float>(std::log(total));
}

}  // namespace
}  // namespace aerie

extern "C" {

// logits [R, V], keys [R], tokens [R].
void aerie_gumbel_argmax(aerie::Pool* pool, const float* logits, const int64_t* keys, int64_t R,
                         int64_t V, int64_t* tokens) {
  pool->run(R, [&](int64_t r) {
    const auto key = static_cast<uint64_t>(keys[r]);
    tokens[r] = aerie::gumbel_argmax(logits + r * V, V,
                                     {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)});
  });
}

void aerie_argmax(aerie::Pool* pool, const float* logits, int64_t R, int64_t V, int64_t* tokens) {
  pool->run(R, [&](int64_t r) { tokens[r] = aerie::argmax(logits + r * V, V); });
}

void aerie_logsumexp(aerie::Pool* pool, const float* logits, int64_t R, int64_t V, float* out) {
  pool->run(R, [&](int64_t r) { out[r] = aerie::logsumexp(logits + r * V, V); });
}

}  // extern "C"
