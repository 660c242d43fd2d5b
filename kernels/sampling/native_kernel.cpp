// Draws from logits, and scores to rank drafts by. The integers of the noise equal those of
// reference.py bit for bit.

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

// Logits at a temperature.
struct Scaled {
  const float* logits;
  float temperature;

  AERIE_INLINE float operator[](int64_t v) const { return logits[v] / temperature; }
  AERIE_INLINE F16 sixteen(int64_t v) const { return load(logits + v) / broadcast(temperature); }
};

struct Unscaled {
  const float* logits;

  AERIE_INLINE float operator[](int64_t v) const { return logits[v]; }
  AERIE_INLINE F16 sixteen(int64_t v) const { return load(logits + v); }
};

// The token of the highest value, the lowest of equals.
template <class Values>
int64_t argmax(const Values& values, int64_t V) {
  F16 highest = broadcast(kMinusInfinity);
  int64_t v = 0;
  for (; v + 16 <= V; v += 16) highest = maximum(highest, values.sixteen(v));
  float best = maximum_of_lanes(highest);
  for (; v < V; ++v) best = std::max(best, values[v]);
  for (v = 0; v < V; ++v)
    if (values[v] == best) return v;
  return 0;
}

int64_t argmax(const float* logits, int64_t V) { return argmax(Unscaled{logits}, V); }

template <class Values>
struct Draw {
  const Values& values;
  Key key;
  int64_t token;
  float best;

  void consider(int64_t candidate) {
    const float value_alone = values[candidate];
    if (value_alone == kMinusInfinity) return;
    const float value = value_alone + gumbel(noise_bits(static_cast<uint32_t>(candidate), key));
    if (value > best || (value == best && candidate < token)) {
      best = value;
      token = candidate;
    }
  }
};

// A token can only win with noise g >= best - logit, that is, v <= 1 - exp(-exp(-g)) <= exp(-g).

// This bound costs one exponential per token; only tokens that pass it need the two logarithms.
template <class Values>
int64_t gumbel_argmax(const Values& values, int64_t V, Key key) {
  const int64_t top = argmax(values, V);
  Draw<Values> draw{values, key, top, kMinusInfinity};
  draw.consider(top);
  const F16 slack = broadcast(1.0f + 1e-4f), unit = broadcast(0x1p-32f);
  int64_t v = 0;
  for (; v + 16 <= V; v += 16) {
    const F16 bound = exponential(values.sixteen(v) - broadcast(draw.best)) * slack + unit;
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

// The splitmix64 finaliser.
uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

Key key_of(uint64_t key) { return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}; }

// noise_keys of reference.py.
Key noise_key(int64_t seed, int64_t position) {
  constexpr uint64_t kGolden64 = 0x9E3779B97F4A7C15u;
  const uint64_t mixed = mix64(static_cast<uint64_t>(seed) + kGolden64);
  return key_of(mix64(mixed + (static_cast<uint64_t>(position) + 1) * kGolden64));
}

// Whether no logit is NaN or +inf, and one is finite.
bool sound(const float* logits, int64_t V) {
  constexpr float kMost = std::numeric_limits<float>::max();
  IVec bad{}, finite{};
  int64_t v = 0;
  for (; v + 16 <= V; v += 16) {
    const F16 values = load(logits + v);
    AERIE_EACH_PART {
      bad |= ~(values.part[i] <= kMost);  // true for NaN
      finite |= values.part[i] >= -kMost;
    }
  }
  bool is_bad = any(bad), is_finite = any(finite);
  for (; v < V; ++v) {
    is_bad |= !(logits[v] <= kMost);
    is_finite |= logits[v] >= -kMost;
  }
  return is_finite && !is_bad;
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

// ---- drafts, see noisy_reference.py --------------------------------------------------------------

constexpr int kBins = 1024;
constexpr float kBinsPerNat = 32.0f, kOutside = 30.0f;

struct Filters {
  int64_t top_k;
  float top_p, min_p;
};

// How one row ranks drafts; `temperature` is above 0.
struct Ranking {
  const float* logits;
  const int64_t* token_ids;  // null: 0, 1, ...
  int64_t V;
  Key key;
  float temperature;
};

// Tokens of one row by the distance to its highest logit.
class Bins {
 public:
  Bins(const Ranking& row, float highest) {
    const float scale = kBinsPerNat / row.temperature;
    for (int64_t v = 0; v < row.V; ++v) {
      const float gap = (highest - row.logits[v]) * scale;
      ++counts_[gap >= 0 && gap < kBins ? static_cast<int>(gap) : kBins - 1];
    }
  }

  // How many of the best bins the filters keep.
  int kept(const Filters& filters) const {
    double masses[kBins], total = 0;
    int64_t before = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      const int64_t left = std::max<int64_t>(filters.top_k - before, 0);
      masses[bin] = std::min<int64_t>(counts_[bin], left) * std::exp((bin + 0.5) / -kBinsPerNat);
      total += masses[bin];
      before += counts_[bin];
    }
    const double reach = -std::log(filters.min_p) * kBinsPerNat + 1;
    const double target = filters.top_p < 1 ? filters.top_p * total : 2 * total;
    double mass = 0;
    before = 0;
    int bin = 0;
    for (; bin < kBins && before < filters.top_k && mass < target && bin < reach; ++bin) {
      before += counts_[bin];
      mass += masses[bin];
    }
    return std::max(bin, 1);
  }

 private:
  int64_t counts_[kBins] = {};
};

// ln(x) of positive normal x, about 1 ulp: the polynomial of Cephes' logf.
AERIE_INLINE F16 logarithm(F16 x) {
  AERIE_EACH_PART {
    const IVec bits = (IVec)x.part[i];
    const IVec power = (bits - 0x3f3504f3) >> 23;  // x / 2^power is between sqrt(1/2) and sqrt(2)
    const Vec r = (Vec)(bits - (power << 23)) - 1.0f;
    Vec p = r * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    p = r + (p * r - 0.5f) * r * r;
    x.part[i] = p + __builtin_convertvector(power, Vec) * 0.69314718056f;
  }
  return x;
}

// -log(-log(1 - v)) to about 1e-3: a series where 1 - v would lose v.
AERIE_INLINE F16 rough_gumbel(U16 bits) {
  F16 v, rest;
  AERIE_EACH_PART {
    const Vec uniform = (__builtin_convertvector(bits.part[i], Vec) + 0.5f) * 0x1p-32f;
    const Vec most = Vec{} + (1.0f - 0x1p-24f);
    v.part[i] = uniform < most ? uniform : most;
    rest.part[i] = 1.0f - v.part[i];
  }
  F16 waited = logarithm(rest);
  AERIE_EACH_PART {
    const Vec x = v.part[i];
    const Vec series = x * (1.0f + x * (0.5f + x * (1.0f / 3.0f)));
    waited.part[i] = x < 0.001f ? series : -waited.part[i];
  }
  return broadcast(0.0f) - logarithm(waited);
}

// Sixteen tokens from v on. Those at `reach` or more below `highest` lie outside the filters.
AERIE_INLINE F16 noisy(const Ranking& row, const float* logits, U16 ids, float highest,
                       float reach) {
  const F16 values = load(logits), gaps = broadcast(highest) - values;
  F16 scaled = values * broadcast(1.0f / row.temperature);
  AERIE_EACH_PART {
    const Vec lower = scaled.part[i] - kOutside;
    scaled.part[i] = gaps.part[i] < reach ? scaled.part[i] : lower;
    ids.part[i] = noise_bits(ids.part[i], row.key);
  }
  return scaled + rough_gumbel(ids);
}

U16 ids_of(const Ranking& row, int64_t v, int count) {
  if (row.token_ids == nullptr) return token_ids(static_cast<uint32_t>(v));
  U16 ids{};
  for (int k = 0; k < count; ++k)
    ids.part[k / kLanes][k % kLanes] = static_cast<uint32_t>(row.token_ids[v + k]);
  return ids;
}

void add_noise(const Ranking& row, const Filters* filters, float* out) {
  float highest = 0, reach = std::numeric_limits<float>::infinity();
  if (filters != nullptr) {
    highest = row.logits[argmax(row.logits, row.V)];
    const int kept = Bins(row, highest).kept(*filters);
    if (kept < kBins) reach = kept * row.temperature / kBinsPerNat;
  }
  int64_t v = 0;
  for (; v + 16 <= row.V; v += 16)
    store(out + v, noisy(row, row.logits + v, ids_of(row, v, 16), highest, reach));
  if (v < row.V) {
    const int count = static_cast<int>(row.V - v);
    float last[16] = {};
    std::copy_n(row.logits + v, count, last);
    store(last, noisy(row, last, ids_of(row, v, count), highest, reach));
    std::copy_n(last, count, out + v);
  }
}

}  // namespace
}  // namespace aerie

extern "C" {

// logits [R, V], keys [R], tokens [R].
void aerie_gumbel_argmax(aerie::Pool* pool, const float* logits, const int64_t* keys, int64_t R,
                         int64_t V, int64_t* tokens) {
  pool->run(R, [&](int64_t r) {
    tokens[r] = aerie::gumbel_argmax(aerie::Unscaled{logits + r * V}, V,
                                     aerie::key_of(static_cast<uint64_t>(keys[r])));
  });
}

// Rows at temperature 0 get their arg-max, others a draw. temperatures, seeds, positions [R].
void aerie_draw(aerie::Pool* pool, const float* logits, const float* temperatures,
                const int64_t* seeds, const int64_t* positions, int64_t R, int64_t V,
                int64_t* tokens) {
  pool->run(R, [&](int64_t r) {
    const float* row = logits + r * V;
    tokens[r] = temperatures[r] > 0
                    ? aerie::gumbel_argmax(aerie::Scaled{row, temperatures[r]}, V,
                                           aerie::noise_key(seeds[r], positions[r]))
                    : aerie::argmax(row, V);
  });
}

void aerie_sound(aerie::Pool* pool, const float* logits, int64_t R, int64_t V, bool* out) {
  pool->run(R, [&](int64_t r) { out[r] = aerie::sound(logits + r * V, V); });
}

void aerie_argmax(aerie::Pool* pool, const float* logits, int64_t R, int64_t V, int64_t* tokens) {
  pool->run(R, [&](int64_t r) { tokens[r] = aerie::argmax(logits + r * V, V); });
}

void aerie_logsumexp(aerie::Pool* pool, const float* logits, int64_t R, int64_t V, float* out) {
  pool->run(R, [&](int64_t r) { out[r] = aerie::logsumexp(logits + r * V, V); });
}

// logits and out [R, V]; temperatures, keys [R]; token_ids [V] or null; top_k, top_p, min_p [R], or
// all null.
void aerie_add_noise(aerie::Pool* pool, const float* logits, const float* temperatures,
                     const int64_t* keys, const int64_t* token_ids, const int64_t* top_k,
                     const float* top_p, const float* min_p, int64_t R, int64_t V, float* out) {
  pool->run(R, [&](int64_t r) {
    const float* from = logits + r * V;
    if (!(temperatures[r] > 0)) {
      std::copy_n(from, V, out + r * V);
      return;
    }
    const aerie::Key key = aerie::key_of(static_cast<uint64_t>(keys[r]));
    const aerie::Ranking row{from, token_ids, V, key, temperatures[r]};
    if (top_k == nullptr) {
      aerie::add_noise(row, nullptr, out + r * V);
    } else {
      const aerie::Filters filters{top_k[r], top_p[r], min_p[r]};
      aerie::add_noise(row, &filters, out + r * V);
    }
  });
}

}  // extern "C"
