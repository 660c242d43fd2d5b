// RMS normalisation, with the addition to the residual stream in the same pass.

#include <cmath>

#include "../native/pool.h"
#include "../native/vector.h"

namespace aerie {
namespace {

constexpr int64_t kRowsPerTask = 16;

// out = (x + residual) / rms * weight for one row; the sum is written back to `residual`.
// Without a residual, x itself is normalised.
void normalise(const float* x, float* residual, const float* weight, int64_t H, float eps,
               float* out) {
  F16 squares{};
  float tail_squares = 0;
  int64_t h = 0;
  for (; h + 16 <= H; h += 16) {
    const F16 v = residual ? load(x + h) + load(residual + h) : load(x + h);
    if (residual) store(residual + h, v);
    squares = multiply_add(v, v, squares);
  }
  for (; h < H; ++h) {
    const float v = residual ? x[h] + residual[h] : x[h];
    if (residual) residual[h] = v;
    tail_squares += v * v;
  }
  const float* row = residual ? residual : x;
  const float scale = 1.0f / std::sqrt((sum_lanes(squares) + tail_squares) / float(H) + eps);
  const F16 scales = broadcast(scale);
  for (h = 0; h + 16 <= H; h += 16)
    store(out + h, load(row + h) * scales * load(weight + h));
  for (; h < H; ++h) out[h] = row[h] * scale * weight[h];
}

}  // namespace
}  // namespace aerie

// x, out [T, H]; residual [T, H] or null; weight [H].
extern "C" void aerie_rms_norm(aerie::Pool* pool, const float* x, float* residual,
                               const float* weight, int64_t T, int64_t H, float eps, float* out) {
  using aerie::kRowsPerTask;
  pool->run((T + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t end = (task + 1) * kRowsPerTask < T ? (task + 1) * kRowsPerTask : T;
    for (int64_t t = task * kRowsPerTask; t < end; ++t)
      aerie::normalise(x + t * H, residual ? residual + t * H : nullptr, weight, H, eps,
                       out + t * H);
  });
}
