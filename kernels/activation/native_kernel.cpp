// Gated activation of the feed-forward block.

#include <algorithm>

#include "../native/pool.h"
#include "../native/vector.h"

namespace aerie {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

// silu(gate) * up of one row. The tail runs on the same vector code, so that a value does not
// depend on its place in the row.
void gate_row(const float* gate, const float* up, int64_t F, float* out) {
  const F16 one = broadcast(1.0f), zero{};
  for (int64_t f = 0; f < F; f += 16) {
    float in[2][16] = {}, result[16];
    const bool whole = f + 16 <= F;
    if (!whole) {
      std::memcpy(in[0], gate + f, (F - f) * sizeof(float));
      std::memcpy(in[1], up + f, (F - f) * sizeof(float));
    }
    const F16 g = load(whole ? gate + f : in[0]), u = load(whole ? up + f : in[1]);
    const F16 activated = g / (one + exponential(zero - g)) * u;
    store(whole ? out + f : result, activated);
    if (!whole) std::memcpy(out + f, result, (F - f) * sizeof(float));
  }
}

}  // namespace
}  // namespace aerie

// gate_up [T, 2F], gate first; out [T, F].
extern "C" void aerie_silu_and_mul(aerie::Pool* pool, const float* gate_up, int64_t T, int64_t F,
                                   float* out) {
  const int64_t rows = std::max<int64_t>(1, aerie::kElementsPerTask / F);
  pool->run((T + rows - 1) / rows, [&](int64_t task) {
    for (int64_t t = task * rows; t < std::min(T, (task + 1) * rows); ++t)
      aerie::gate_row(gate_up + t * 2 * F, gate_up + t * 2 * F + F, F, out + t * F);
  });
}
