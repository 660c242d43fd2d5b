// Split the fused projection, rotate queries and keys, write keys and values into their pages.

#include <algorithm>

#include "../native/pool.h"
#include "../native/vector.h"

namespace aerie {
namespace {

constexpr int64_t kTokensPerTask = 16;

// Rotate pairs (i, i + D/2) by the position's angles, and multiply them by `factor`; `out` may have
// another element type.
template <class Out>
void rotate(const float* head, const float* cos_sin, int64_t D, float factor, Out* out) {
  const int64_t half = D / 2;
  const float* cos = cos_sin;
  const float* sin = cos_sin + half;
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i], high = head[i + half];
    narrow((low * cos[i] - high * sin[i]) * factor, out + i);
    narrow((high * cos[i] + low * sin[i]) * factor, out + i + half);
  }
}

struct RopeShape {
  int64_t T, num_heads, num_kv_heads, D;
};

// Factors of keys and values.
struct Inverses {
  float key, value;
};

template <class C>
void rope_kv_write(Pool& pool, const float* qkv, const RopeShape& shape, const float* cos_sin,
                   const int64_t* positions, const int64_t* slots, C* keys, C* values,
                   const Inverses& inverses, float* queries) {
  const auto [T, num_heads, num_kv_heads, D] = shape;
  const int64_t width = (num_heads + 2 * num_kv_heads) * D;
  pool.run((T + kTokensPerTask - 1) / kTokensPerTask, [&, T = T, num_heads = num_heads,
                                                       num_kv_heads = num_kv_heads,
                                                       D = D](int64_t task) {
    for (int64_t t = task * kTokensPerTask; t < std::min(T, (task + 1) * kTokensPerTask); ++t) {
      const float* token = qkv + t * width;
      const float* angles = cos_sin + positions[t] * D;
      const int64_t place = slots[t] * num_kv_heads * D;
      for (int64_t h = 0; h < num_heads; ++h)
        rotate(token + h * D, angles, D, 1.0f, queries + (t * num_heads + h) * D);
      const float* key = token + num_heads * D;
      for (int64_t h = 0; h < num_kv_heads; ++h)
        rotate(key + h * D, angles, D, inverses.key, keys + place + h * D);
      const float* value = key + num_kv_heads * D;
      for (int64_t i = 0; i < num_kv_heads * D; ++i)
        narrow(value[i] * inverses.value, values + place + i);
    }
  });
}

}  // namespace
}  // namespace aerie

extern "C" {

// qkv [T, (Hq + 2 Hkv) D]; cos_sin [max_len, D]; keys, values [slots, Hkv, D]; queries [T, Hq, D].
#define AERIE_ROPE_KV_WRITE(NAME, CACHE)                                                          \
  void NAME(aerie::Pool* pool, const float* qkv, int64_t T, int64_t num_heads,                    \
            int64_t num_kv_heads, int64_t D, const float* cos_sin, const int64_t* positions,      \
            const int64_t* slots, CACHE* keys, CACHE* values, float key_inverse,                  \
            float value_inverse, float* queries) {                                                \
    aerie::rope_kv_write<CACHE>(*pool, qkv, {T, num_heads, num_kv_heads, D}, cos_sin, positions,  \
                                slots, keys, values, {key_inverse, value_inverse}, queries);      \
  }

AERIE_ROPE_KV_WRITE(aerie_rope_kv_write_bf16, uint16_t)
AERIE_ROPE_KV_WRITE(aerie_rope_kv_write_f32, float)
AERIE_ROPE_KV_WRITE(aerie_rope_kv_write_fp8, aerie::Fp8)

}  // extern "C"
