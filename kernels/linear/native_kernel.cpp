// Linear layers over packed weights: pack, multiply, and look up rows of a (tied) weight.

#include <algorithm>

#include "../native/pool.h"
#include "../native/vector.h"
#include "amx_kernel.h"
#include "dot_kernel.h"
#include "panels.h"
#include "vector_kernel.h"

namespace aerie {
namespace {

constexpr int64_t kPanelsPerTask = 8;  // 128 outputs

enum Scratch { kInputs, kTiled };

template <class W>
void pack(Pool& pool, const W* weight, int64_t N, int64_t K, W* packed) {
  const int64_t size = panel_size(packed, K);
  pool.run(num_panels(N), [&](int64_t panel) {
    W* to = packed + panel * size;
    std::memset(to, 0, size * sizeof(W));
    for (int n = 0; n < kPanel && panel * kPanel + n < N; ++n)
      for (int64_t k = 0; k < K; ++k)
        to[panel_index(packed, k, n)] = weight[(panel * kPanel + n) * K + k];
  });
}

// Call body(group, first, last) for each group of rows and range of panels, on all threads; the
// panels of one group of rows start before those of the next.
template <class Body>
void for_groups(Pool& pool, int64_t num_groups, int64_t N, const Body& body) {
  const int64_t panels = num_panels(N), tasks = (panels + kPanelsPerTask - 1) / kPanelsPerTask;
  pool.run(num_groups * tasks, [&](int64_t task) {
    const int64_t first = task % tasks * kPanelsPerTask;
    body(task / tasks, first, std::min(first + kPanelsPerTask, panels));
  });
}

template <class W>
void multiply(Pool& pool, const LinearShape& shape, const float* x, const W* weight,
              const float* bias, float* out) {
  const float* inputs = x;
  if (shape.M > 1) {
    float* blocks = pool.scratch<float>(kInputs, shape.M * shape.K);
    pool.run(num_row_blocks(shape.M), [&](int64_t b) {
      const int64_t row = first_row(b, shape.M), rows = first_row(b + 1, shape.M) - row;
      interleave_rows(x + row * shape.K, rows, shape.K, blocks + row * shape.K);
    });
    inputs = blocks;
  }
  for_groups(pool, 1, shape.N, [&](int64_t, int64_t first, int64_t last) {
    multiply_panels(shape, inputs, weight, bias, out, first, last);
  });
}

#if AERIE_HAS_AMX
void multiply_amx(Pool& pool, const LinearShape& shape, const float* x, const uint16_t* weight,
                  const float* bias, float* out) {
  const TiledInputs inputs{
      pool.scratch<uint16_t>(kTiled, TiledInputs::size(shape.M, shape.K)),
      round_up(shape.K, kTileK) / kTileK};
  pool.run((shape.M + kTileRows - 1) / kTileRows, [&](int64_t task) {
    const int64_t first = task * kTileRows, last = first + kTileRows;
    for (int64_t row = first; row < (last < shape.M ? last : shape.M); ++row)
      round_row(x + row * shape.K, shape.K, inputs.tile(row, 0) + row % kTileRows * kTileK,
                TiledInputs::kTile);
  });
  for_groups(pool, num_row_groups(shape.M), shape.N, [&](int64_t group, int64_t first, int64_t last) {
    multiply_group(shape, inputs, group, weight, bias, out, first, last);
  });
}
#endif

#if AERIE_HAS_DOTS
void multiply_dots(Pool& pool, const LinearShape& shape, const float* x, const uint16_t* weight,
                   const float* bias, float* out) {
  const int64_t chunks = round_up(shape.K, kTileK) / kTileK;
  const BlockedInputs inputs{pool.scratch<uint16_t>(kTiled, shape.M * chunks * kTileK), chunks};
  pool.run(num_row_blocks(shape.M), [&](int64_t b) {
    const int64_t first = first_row(b, shape.M), last = first_row(b + 1, shape.M);
    for (int64_t row = first; row < last; ++row)
      round_row(x + row * shape.K, shape.K, inputs.block(first) + (row - first) * kTileK,
                (last - first) * kTileK);
  });
  for_groups(pool, num_dot_groups(shape.M), shape.N,
             [&](int64_t group, int64_t first, int64_t last) {
               multiply_dot_group(shape, inputs, group, weight, bias, out, first, last);
             });
}
#endif

template <class W>
void look_up(Pool& pool, const int64_t* ids, int64_t T, const W* weight, int64_t K, float* out) {
  const int64_t size = panel_size(weight, K);
  pool.run(T, [&](int64_t t) {
    const W* panel = weight + ids[t] / kPanel * size;
    const int n = static_cast<int>(ids[t] % kPanel);
    for (int64_t k = 0; k < K; ++k) out[t * K + k] = widen(panel[panel_index(weight, k, n)]);
  });
}

}  // namespace
}  // namespace aerie

extern "C" {

using aerie::LinearShape;
using aerie::Pool;

// Whether bfloat16 weights can be multiplied on AMX tiles; asks the operating system for them.
int aerie_amx_available() {
#if AERIE_HAS_AMX
  return aerie::amx_permitted();
#else
  return 0;
#endif
}

// Whether bfloat16 weights can be multiplied by bfloat16 dot products.
int aerie_dots_available() { return AERIE_HAS_DOTS; }

int64_t aerie_packed_elements_bf16(int64_t N, int64_t K) {
  return aerie::num_panels(N) * aerie::panel_size(static_cast<uint16_t*>(nullptr), K);
}

int64_t aerie_packed_elements_f32(int64_t N, int64_t K) {
  return aerie::num_panels(N) * aerie::panel_size(static_cast<float*>(nullptr), K);
}

void aerie_pack_bf16(Pool* pool, const uint16_t* weight, int64_t N, int64_t K, uint16_t* packed) {
  aerie::pack(*pool, weight, N, K, packed);
}

void aerie_pack_f32(Pool* pool, const float* weight, int64_t N, int64_t K, float* packed) {
  aerie::pack(*pool, weight, N, K, packed);
}

void aerie_linear_bf16(Pool* pool, const float* x, int64_t M, int64_t K, const uint16_t* weight,
                       int64_t N, const float* bias, float* out) {
  aerie::multiply(*pool, LinearShape{M, K, N}, x, weight, bias, out);
}

void aerie_linear_f32(Pool* pool, const float* x, int64_t M, int64_t K, const float* weight,
                      int64_t N, const float* bias, float* out) {
  aerie::multiply(*pool, LinearShape{M, K, N}, x, weight, bias, out);
}

#if AERIE_HAS_AMX
void aerie_linear_bf16_amx(Pool* pool, const float* x, int64_t M, int64_t K,
                           const uint16_t* weight, int64_t N, const float* bias, float* out) {
  aerie::multiply_amx(*pool, LinearShape{M, K, N}, x, weight, bias, out);
}
#endif

#if AERIE_HAS_DOTS
void aerie_linear_bf16_dots(Pool* pool, const float* x, int64_t M, int64_t K,
                            const uint16_t* weight, int64_t N, const float* bias, float* out) {
  aerie::multiply_dots(*pool, LinearShape{M, K, N}, x, weight, bias, out);
}
#endif

void aerie_embedding_bf16(Pool* pool, const int64_t* ids, int64_t T, const uint16_t* weight,
                          int64_t K, float* out) {
  aerie::look_up(*pool, ids, T, weight, K, out);
}

void aerie_embedding_f32(Pool* pool, const int64_t* ids, int64_t T, const float* weight, int64_t K,
                         float* out) {
  aerie::look_up(*pool, ids, T, weight, K, out);
}

}  // extern "C"
