// The router of a mixture of experts. The experts' products are those of linear layers, a call for
// each expert that has tokens: see NativeOps.moe.

#include <algorithm>
#include <cmath>

#include "../native/pool.h"

namespace aerie {
namespace {

constexpr int64_t kTokensPerTask = 16;

// Scalar code: vectors of torch treat the end of a row differently from its middle.
void route_token(const float* logits, int64_t E, const float* x, int64_t H, int64_t* expert,
                 float* scaled) {
  *expert = std::max_element(logits, logits + E) - logits;  // the first among equals
  const float score = 1.0f / (1.0f + std::exp(-logits[*expert]));
  for (int64_t h = 0; h < H; ++h) scaled[h] = x[h] * score;
}

}  // namespace
}  // namespace aerie

// logits [T, E], x [T, H] -> the expert of each token [T], and its scaled inputs [T, H].
extern "C" void aerie_route(aerie::Pool* pool, const float* logits, int64_t T, int64_t E,
                            const float* x, int64_t H, int64_t* experts, float* scaled) {
  pool->run((T + aerie::kTokensPerTask - 1) / aerie::kTokensPerTask, [&](int64_t task) {
    const int64_t first = task * aerie::kTokensPerTask;
    for (int64_t t = first; t < std::min(T, first + aerie::kTokensPerTask); ++t)
      aerie::route_token(logits + t * E, E, x + t * H, H, experts + t, scaled + t * H);
  });
}
