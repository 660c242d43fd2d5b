// Linear layers over weights quantised in groups: pack, multiply, and look up rows.

#include <algorithm>

#include "../native/pool.h"
#include "group_kernel.h"
#include "group_tiles.h"

namespace aerie {
namespace {

enum Scratch { kHigh = 2, kLow, kScaleBuffer, kSums, kScaledSums };

// A grouped weight before packing, row by row.
template <class Scale>
struct GroupSource {
  const uint8_t* codes;   // [N, K]
  const Scale* scales;    // [N, groups]
  const Scale* minimums;  // [N, groups] or null
};

template <class Kind>
void pack_group(const GroupSource<typename Kind::ScaleType>& source, int64_t row, int64_t K, int n,
                int64_t g, uint8_t* group) {
  using Scale = typename Kind::ScaleType;
  const uint8_t* codes = source.codes + row * K + g * Kind::kGroup;
  for (int k = 0; k < Kind::kGroup; ++k)
    group[Kind::code_byte(k, n)] |= codes[k] << Kind::code_shift(k);
  const int64_t at = row * (K / Kind::kGroup) + g;
  reinterpret_cast<Scale*>(group + Kind::kScales)[n] = source.scales[at];
  if constexpr (Kind::kHasMinimum)
    reinterpret_cast<Scale*>(group + Kind::kMinimums)[n] = source.minimums[at];
}

template <class Kind>
void pack_groups(Pool& pool, const GroupSource<typename Kind::ScaleType>& source, int64_t N,
                 int64_t K, uint8_t* packed) {
  const int64_t size = Kind::panel_bytes(K);
  pool.run(num_panels(N), [&](int64_t panel) {
    uint8_t* to = packed + panel * size;
    std::memset(to, 0, size);
    for (int n = 0; n < kPanel && panel * kPanel + n < N; ++n)
      for (int64_t g = 0; g < K / Kind::kGroup; ++g)
        pack_group<Kind>(source, panel * kPanel + n, K, n, g, to + g * Kind::kBytes);
  });
}

template <class Kind, int Bytes>
GroupInputs quantise_inputs(Pool& pool, const float* x, int64_t M, int64_t K) {
  const int64_t groups = K / Kind::kGroup;
  const GroupInputs inputs{pool.scratch<int8_t>(kHigh, M * K),
                           Bytes == 2 ? pool.scratch<int8_t>(kLow, M * K) : nullptr,
                           pool.scratch<float>(kScaleBuffer, M * groups),
                           pool.scratch<int32_t>(kSums, M * groups),
                           pool.scratch<float>(kScaledSums, M * groups),
                           K,
                           groups};
  constexpr int64_t kRowsPerTask = 4;
  pool.run((M + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    for (int64_t row = task * kRowsPerTask; row < std::min(M, (task + 1) * kRowsPerTask); ++row)
      quantise_row<Kind::kGroup, Bytes>(x + row * K, row, inputs);
  });
  return inputs;
}

// How panels are shared out. If they are read once: first a long run for each thread, because memory
// is read fastest in long runs, then short ones, so that threads end together. If they are read again
// and again: short runs, which stay in the cache.
class PanelRuns {
 public:
  PanelRuns(int64_t panels, int64_t threads, bool once)
      : panels_(panels),
        threads_(threads),
        long_(once ? panels * 7 / 8 / threads : 0),
        short_(std::clamp<int64_t>(panels / (threads * 8), 1, 16)) {}

  int64_t count() const {
    return num_long() + (panels_ - num_long() * long_ + short_ - 1) / short_;
  }

  // The first panel of a run; the runs lie one after the other.
  int64_t first(int64_t run) const {
    const int64_t short_runs = std::max<int64_t>(run - num_long(), 0);
    return std::min(panels_, (run - short_runs) * long_ + short_runs * short_);
  }

 private:
  int64_t num_long() const { return long_ ? threads_ : 0; }

  int64_t panels_, threads_, long_, short_;
};

template <class Kind, int Bytes>
void multiply_groups(Pool& pool, const LinearShape& shape, const float* x, const uint8_t* weight,
                     const float* bias, float* out, int64_t stride) {
  const GroupProduct product{
      shape, quantise_inputs<Kind, Bytes>(pool, x, shape.M, shape.K), weight, bias, out, stride};
  const PanelRuns runs(num_panels(shape.N), pool.num_threads(), shape.M <= kMaxGroupRows);
  pool.run(runs.count(), [&](int64_t run) {
    const int64_t first = runs.first(run), last = runs.first(run + 1);
    int64_t done = 0;
#if AERIE_HAS_AMX
    done = multiply_on_tiles<Kind, Bytes>(product, first, last);
#endif
    const int64_t rows = shape.M - done, blocks = (rows + kMaxGroupRows - 1) / kMaxGroupRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = done + rows * b / blocks, end = done + rows * (b + 1) / blocks;
      multiply_panels<Kind, Bytes>(end - row, product, row, first, last);
    }
  });
}

template <class Kind>
void look_up_groups(Pool& pool, const int64_t* ids, int64_t T, const uint8_t* weight, int64_t K,
                    float* out) {
  using Scale = typename Kind::ScaleType;
  const int64_t size = Kind::panel_bytes(K);
  pool.run(T, [&](int64_t t) {
    const uint8_t* group = weight + ids[t] / kPanel * size;
    const int n = static_cast<int>(ids[t] % kPanel);
    float* row = out + t * K;
    for (int64_t g = 0; g < K / Kind::kGroup; ++g, group += Kind::kBytes, row += Kind::kGroup) {
      const float scale = widen_scale(reinterpret_cast<const Scale*>(group + Kind::kScales)[n]);
      float minimum = 0;
      if constexpr (Kind::kHasMinimum)
        minimum = widen_scale(reinterpret_cast<const Scale*>(group + Kind::kMinimums)[n]);
      for (int k = 0; k < Kind::kGroup; ++k)
        row[k] = scale * float(Kind::code(group, k, n) - Kind::kZero) + minimum;
    }
  });
}

// Call use(Kind{}) with the kind of a weight.
template <class Use>
auto with_kind(int64_t bits, int64_t group, bool wide_scales, bool has_minimums, const Use& use) {
  if (group == 16) return use(GroupKind<8, 16, float, false>{});  // Q6_K
  if (wide_scales) return bits == 4 ? use(GroupKind<4, 32, float, true>{})   // Q4_K
                                    : use(GroupKind<8, 32, float, true>{});  // Q5_K
  if (bits == 4) return has_minimums ? use(GroupKind<4, 32, uint16_t, true>{})
                                     : use(GroupKind<4, 32, uint16_t, false>{});
  return has_minimums ? use(GroupKind<8, 32, uint16_t, true>{})
                      : use(GroupKind<8, 32, uint16_t, false>{});
}

}  // namespace
}  // namespace aerie

extern "C" {

using aerie::LinearShape;
using aerie::Pool;

int64_t aerie_packed_bytes_groups(int64_t bits, int64_t group, int64_t wide, int64_t minimums,
                                  int64_t N, int64_t K) {
  return aerie::with_kind(bits, group, wide, minimums, [&](auto kind) {
    return aerie::num_panels(N) * decltype(kind)::panel_bytes(K);
  });
}

void aerie_pack_groups(Pool* pool, int64_t bits, int64_t group, int64_t wide, const uint8_t* codes,
                       const void* scales, const void* minimums, int64_t N, int64_t K,
                       uint8_t* packed) {
  aerie::with_kind(bits, group, wide, minimums != nullptr, [&](auto kind) {
    using Scale = typename decltype(kind)::ScaleType;
    aerie::pack_groups<decltype(kind)>(
        *pool, {codes, static_cast<const Scale*>(scales), static_cast<const Scale*>(minimums)}, N, K,
        packed);
  });
}

void aerie_linear_groups_8(Pool* pool, int64_t bits, int64_t group, int64_t wide, int64_t minimums,
                           const float* x, int64_t M, int64_t K, const uint8_t* weight, int64_t N,
                           const float* bias, float* out, int64_t stride) {
  aerie::with_kind(bits, group, wide, minimums, [&](auto kind) {
    aerie::multiply_groups<decltype(kind), 1>(*pool, LinearShape{M, K, N}, x, weight, bias, out,
                                              stride);
  });
}

void aerie_linear_groups_16(Pool* pool, int64_t bits, int64_t group, int64_t wide,
                            int64_t minimums, const float* x, int64_t M, int64_t K,
                            const uint8_t* weight, int64_t N, const float* bias, float* out,
                            int64_t stride) {
  aerie::with_kind(bits, group, wide, minimums, [&](auto kind) {
    aerie::multiply_groups<decltype(kind), 2>(*pool, LinearShape{M, K, N}, x, weight, bias, out,
                                              stride);
  });
}

void aerie_embedding_groups(Pool* pool, int64_t bits, int64_t group, int64_t wide, int64_t minimums,
                            const int64_t* ids, int64_t T, const uint8_t* weight, int64_t K,
                            float* out) {
  aerie::with_kind(bits, group, wide, minimums, [&](auto kind) {
    aerie::look_up_groups<decltype(kind)>(*pool, ids, T, weight, K, out);
  });
}

}  // extern "C"
