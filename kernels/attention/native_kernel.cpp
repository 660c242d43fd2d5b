// Attention over a paged prefix and a causal or tree-shaped suffix (flash attention on a CPU).
//
// Each span of a row's keys gives a partial result (maximum, sum, weighted values) per query head;
// partial results merge in ascending order. So the bits of a query's result do not depend on
// whether it comes alone, in a prompt chunk of any size, as a node of any tree, or beside other
// rows, nor on which threads compute the spans.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../native/pool.h"
#include "../native/vector.h"
#include "amx_kernel.h"
#include "dot_kernel.h"
#include "problem.h"

namespace aerie {
namespace {

// The keys of one KV head in `count` slots as floats, padded with zeros to sixteen.
template <class C>
void gather_keys(const Problem<C>& p, int64_t kv_head, const int64_t* slots, int64_t count,
                 float* to) {
  for (int64_t k = 0; k < kGroup; ++k, to += p.D) {
    if (k >= count) {
      std::fill_n(to, p.D, 0.0f);
      continue;
    }
    const C* key = p.keys + (slots[k] * p.num_kv_heads + kv_head) * p.D;
    int64_t d = 0;
    for (; d + 16 <= p.D; d += 16) store(to + d, load(key + d));
    for (; d < p.D; ++d) to[d] = widen(key[d]);
  }
}

// Keys whose products with a query are summed up at a time, as many as registers allow.
constexpr int kKeysAtOnce = kLanes == 16 ? kGroup : 4;

// The products of one query with sixteen keys. D is a multiple of 16 here.
AERIE_INLINE F16 scores_of(const float* query, const float* keys, int64_t D) {
  F16 products[kGroup];
  AERIE_UNROLL for (int first = 0; first < kGroup; first += kKeysAtOnce) {
    F16 sums[kKeysAtOnce];
    AERIE_UNROLL for (int k = 0; k < kKeysAtOnce; ++k) sums[k] = F16{};
    for (int64_t d = 0; d < D; d += 16) {
      const F16 part = load(query + d);
      AERIE_UNROLL for (int k = 0; k < kKeysAtOnce; ++k)
        sums[k] = multiply_add(part, load(keys + (first + k) * D + d), sums[k]);
    }
    AERIE_UNROLL for (int k = 0; k < kKeysAtOnce; ++k) products[first + k] = sums[k];
  }
  return sum_each(products);
}

// The same for any other head dimension.
inline F16 scores_of_odd(const float* query, const float* keys, int64_t D) {
  float sums[kGroup];
  for (int k = 0; k < kGroup; ++k) {
    sums[k] = 0;
    for (int64_t d = 0; d < D; ++d) sums[k] += query[d] * keys[k * D + d];
  }
  return load(sums);
}

// Scores of all tile rows against the columns of one span; -inf where not visible.
template <class C>
void score_span(const Problem<C>& p, const Tile& tile, const Columns& columns, Workspace& work) {
  const int64_t rows = tile.num_queries * p.group();
  for (int64_t column = 0; column < columns.count; column += kGroup) {
    const int64_t count = std::min<int64_t>(kGroup, columns.count - column);
    gather_keys(p, tile.kv_head, work.slots + column, count, work.keys);
    for (int64_t r = 0; r < rows; ++r) {
      const float* query = query_row(p, tile, r);
      const F16 scores = p.D % 16 == 0 ? scores_of(query, work.keys, p.D)
                                       : scores_of_odd(query, work.keys, p.D);
      store(work.scores[r] + column, visible_scores(p, tile, r, columns, column, scores));
    }
  }
}

// Turn the scores of all tile rows into the weights of the columns.
template <class C>
void weigh_span(const Problem<C>& p, const Tile& tile, const Columns& columns, Workspace& work,
                Partial* partials) {
  for (int64_t r = 0; r < tile.num_queries * p.group(); ++r) {
    float* scores = work.scores[r];
    if (!columns.branch) {
      weigh_row(scores, columns.positions(), partials[r]);
      continue;
    }
    const PathPart part = path_part(p, tile, tile.first_query + r / p.group(), columns);
    take_path(part, columns, scores);
    weigh_row(scores, columns.positions(), partials[r]);
    return_path(part, columns, scores);
  }
}

// Weighted sums of Rows x 16 Parts of the values, keys in ascending order.
template <int Rows, int Parts, class C>
AERIE_INLINE void mix(const Problem<C>& p, int64_t kv_head, int64_t num_keys, int64_t first_row,
                      int64_t d, const Workspace& work, Partial* partials) {
  F16 sums[Rows][Parts];
  AERIE_UNROLL for (int r = 0; r < Rows; ++r)
    AERIE_UNROLL for (int c = 0; c < Parts; ++c) sums[r][c] = F16{};
  for (int64_t k = 0; k < num_keys; ++k) {
    // A key that no row sees may hold anything, even NaN.
    bool seen = false;
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) seen |= work.scores[first_row + r][k] != 0;
    if (!seen) continue;
    const C* value = p.values + (work.slots[k] * p.num_kv_heads + kv_head) * p.D + d;
    AERIE_UNROLL for (int c = 0; c < Parts; ++c) {
      const F16 part = load(value + c * 16);
      AERIE_UNROLL for (int r = 0; r < Rows; ++r)
        sums[r][c] = multiply_add(broadcast(work.scores[first_row + r][k]), part, sums[r][c]);
    }
  }
  AERIE_UNROLL for (int r = 0; r < Rows; ++r)
    AERIE_UNROLL for (int c = 0; c < Parts; ++c)
      store(partials[first_row + r].values + d + c * 16, sums[r][c]);
}

template <int Rows, class C>
void mix_columns(const Problem<C>& p, int64_t kv_head, int64_t num_keys, int64_t row,
                 const Workspace& work, Partial* partials) {
  constexpr int kTogether = kLanes == 16 ? 4 : kLanes == 8 && Rows < 4 ? 2 : 1;
  int64_t d = 0;
  for (; d + 16 * kTogether <= p.D; d += 16 * kTogether)
    mix<Rows, kTogether>(p, kv_head, num_keys, row, d, work, partials);
  for (; d + 16 <= p.D; d += 16) mix<Rows, 1>(p, kv_head, num_keys, row, d, work, partials);
  for (; d < p.D; ++d) {
    for (int64_t r = row; r < row + Rows; ++r) {
      float sum = 0;
      for (int64_t k = 0; k < num_keys; ++k)
        if (work.scores[r][k] != 0)
          sum += work.scores[r][k] *
                 widen(p.values[(work.slots[k] * p.num_kv_heads + kv_head) * p.D + d]);
      partials[r].values[d] = sum;
    }
  }
}

// One span of keys for all rows of a tile.
template <class C>
void attend_span(const Problem<C>& p, const Tile& tile, int64_t begin, int64_t end,
                 Workspace& work, Partial* partials) {
  const Columns columns = columns_of(p, tile, begin, end);
  find_slots(p, tile, columns, work.slots);
  if constexpr (std::is_same_v<C, uint16_t>) {
    [[maybe_unused]] const Products products =
        p.D % kTileK == 0 ? p.products : Products::kFloats;
#if AERIE_HAS_AMX
    if (products == Products::kTiles)
      return attend_span_rounded<TileProducts>(p, tile, columns, work, partials);
#endif
#if AERIE_HAS_DOTS
    if (products == Products::kDots)
      return attend_span_rounded<DotProducts>(p, tile, columns, work, partials);
#endif
  }
  const int64_t rows = tile.num_queries * p.group();
  score_span(p, tile, columns, work);
  weigh_span(p, tile, columns, work, partials);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    mix_columns<4>(p, tile.kv_head, columns.count, r, work, partials);
  if (rows - r == 3) mix_columns<3>(p, tile.kv_head, columns.count, r, work, partials);
  if (rows - r == 2) mix_columns<2>(p, tile.kv_head, columns.count, r, work, partials);
  if (rows - r == 1) mix_columns<1>(p, tile.kv_head, columns.count, r, work, partials);
}

// total <- total + span, both relative to their maxima.
void merge(Partial& total, const Partial& span, int64_t D) {
  if (span.sum == 0) return;
  if (total.sum == 0) {
    total.maximum = span.maximum;
    total.sum = span.sum;
    std::copy_n(span.values, D, total.values);
    return;
  }
  const float highest = std::max(total.maximum, span.maximum);
  const float keep = std::exp(total.maximum - highest), add = std::exp(span.maximum - highest);
  for (int64_t d = 0; d < D; ++d) total.values[d] = total.values[d] * keep + span.values[d] * add;
  total.sum = total.sum * keep + span.sum * add;
  total.maximum = highest;
}

template <class C>
void write_out(const Problem<C>& p, const Tile& tile, const Partial* totals) {
  for (int64_t r = 0; r < tile.num_queries * p.group(); ++r) {
    float* to = p.out + (query_row(p, tile, r) - p.queries);
    for (int64_t d = 0; d < p.D; ++d) to[d] = totals[r].values[d] / totals[r].sum * p.value_scale;
  }
}

// Read all keys and values of a span, so that they come from memory in long runs. A tile reads only
// those of one head, from which the hardware does not guess what comes next.
template <class C>
void bring_near(const Problem<C>& p, const Tile& tile, int64_t begin, int64_t end) {
  constexpr int64_t line = 64 / sizeof(C);
  const int64_t size = p.num_kv_heads * p.D;
  for (const C* from : {p.keys, p.values})
    for (int64_t position = begin; position < end; ++position) {
      const C* at = from + slot_of(p, tile.row, position) * size;
      for (int64_t i = 0; i < size; i += line) asm volatile("" ::"r"(at[i]));
    }
}

// `heads` tiles of the same queries, each of another KV head, span by span.
template <class C>
void attend_tiles(const Problem<C>& p, const Tile* tiles, int64_t heads) {
  thread_local Workspace work;
  thread_local std::vector<float> values;
  thread_local std::vector<Partial> partials;
  const int64_t rows = tiles->num_queries * p.group();
  const int64_t count = (heads + 1) * rows;  // results of all tiles, and of one span
  values.resize(std::max<size_t>(values.size(), count * p.D));
  partials.resize(std::max<size_t>(partials.size(), count));
  for (int64_t i = 0; i < count; ++i) partials[i] = {kMinusInfinity, 0, values.data() + i * p.D};
  Partial* span = partials.data() + heads * rows;
  const Spans keys = spans_of(p, *tiles);
  for (int64_t s = keys.first(); s < keys.last(); ++s) {
    if (heads > 1) bring_near(p, *tiles, keys.begin(s), keys.end(s));
    for (int64_t h = 0; h < heads; ++h) {
      attend_span(p, tiles[h], keys.begin(s), keys.end(s), work, span);
      for (int64_t r = 0; r < rows; ++r) merge(partials[h * rows + r], span[r], p.D);
    }
  }
  for (int64_t h = 0; h < heads; ++h) write_out(p, tiles[h], partials.data() + h * rows);
}

// For few tiles over many keys: each span is a task, and the results are merged afterwards. `heads`
// as for attend_tiles.
template <class C>
void attend_spans(Pool& pool, const Problem<C>& p, const std::vector<Tile>& tiles, int64_t heads) {
  const size_t groups = tiles.size() / heads;
  std::vector<int64_t> first_span(groups + 1);
  const auto keys_of_group = [&](size_t g) { return spans_of(p, tiles[g * heads]); };
  for (size_t g = 0; g < groups; ++g)
    first_span[g + 1] = first_span[g] + keys_of_group(g).last() - keys_of_group(g).first();
  const int64_t num_spans = first_span.back(), num_partials = num_spans * heads * kMaxQueryRows;
  float* values = pool.scratch<float>(0, num_partials * p.D);
  Partial* partials = pool.scratch<Partial>(1, num_partials);
  for (int64_t i = 0; i < num_partials; ++i) partials[i] = {kMinusInfinity, 0, values + i * p.D};
  const auto results_of = [&](int64_t span, int64_t h) {
    return partials + (span * heads + h) * kMaxQueryRows;
  };
  pool.run(num_spans, [&](int64_t task) {
    thread_local Workspace work;
    const size_t g = std::upper_bound(first_span.begin(), first_span.end(), task) -
                     first_span.begin() - 1;
    const Spans keys = keys_of_group(g);
    const int64_t s = keys.first() + task - first_span[g];
    const Tile* group = &tiles[g * heads];
    if (heads > 1) bring_near(p, *group, keys.begin(s), keys.end(s));
    for (int64_t h = 0; h < heads; ++h)
      attend_span(p, group[h], keys.begin(s), keys.end(s), work, results_of(task, h));
  });
  pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const int64_t g = i / heads, h = i % heads, rows = tiles[i].num_queries * p.group();
    Partial* totals = results_of(first_span[g], h);
    for (int64_t task = first_span[g] + 1; task < first_span[g + 1]; ++task)
      for (int64_t r = 0; r < rows; ++r) merge(totals[r], results_of(task, h)[r], p.D);
    write_out(p, tiles[i], totals);
  });
}

// The largest n <= most such that of queries first .. first+n-1 either all have a mask or none.
template <class C>
int64_t queries_alike(const Problem<C>& p, int64_t row, int64_t first, int64_t most) {
  int64_t n = 1;
  while (n < most && (p.mask(row, first + n) == 0) == (p.mask(row, first) == 0)) ++n;
  return n;
}

template <class C>
void attention(Pool& pool, const Problem<C>& p) {
  std::vector<Tile> tiles;
  int64_t longest = 0;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t queries = p.cu_q[row + 1] - p.cu_q[row];
    longest = std::max<int64_t>(longest, p.prefix_lens[row] + queries);
    for (int64_t q = 0, count; q < queries; q += count) {
      count = queries_alike(p, row, q, std::min(p.queries_per_tile(), queries - q));
      const uint64_t entries = branching_entries(p, row, q, count);
      for (int64_t h = 0; h < p.num_kv_heads; ++h) tiles.push_back({row, h, q, count, entries});
    }
  }
  const int64_t num_tiles = tiles.size(), threads = pool.num_threads();
  const bool by_span = num_tiles < 8 * threads && longest > kSpan;
  // The heads of a row are one task if there are enough tasks without cutting it.
  const int64_t num_tasks = num_tiles * (by_span ? (longest + kSpan - 1) / kSpan : 1);
  const int64_t heads = num_tasks / p.num_kv_heads < 3 * threads ? 1 : p.num_kv_heads;
  if (by_span) return attend_spans(pool, p, tiles, heads);
  pool.run(num_tiles / heads,
           [&](int64_t i) { attend_tiles(p, tiles.data() + i * heads, heads); });
}

}  // namespace
}  // namespace aerie

extern "C" {

// Shapes as in Problem; ancestors as in AttentionMeta.
#define AERIE_ATTENTION(NAME, CACHE, PRODUCTS)                                                   \
  void NAME(aerie::Pool* pool, const float* queries, const CACHE* keys, const CACHE* values,     \
            const int32_t* cu_q, const int32_t* prefix_lens, const int32_t* first_keys,          \
            int64_t num_rows, const int32_t* block_tables, const int64_t* ancestors,             \
            int64_t max_blocks, int64_t block_size, int64_t num_heads, int64_t num_kv_heads,     \
            int64_t D, float scale, float value_scale, float* out) {                             \
    aerie::attention<CACHE>(*pool, {queries, keys, values, cu_q, prefix_lens, first_keys,        \
                                    block_tables, ancestors, num_rows, max_blocks, block_size,   \
                                    num_heads, num_kv_heads, D, scale, value_scale, out,         \
                                    PRODUCTS});                                                  \
  }

AERIE_ATTENTION(aerie_attention_f32, float, aerie::Products::kFloats)
AERIE_ATTENTION(aerie_attention_bf16, uint16_t, aerie::Products::kFloats)
AERIE_ATTENTION(aerie_attention_fp8, aerie::Fp8, aerie::Products::kFloats)
#if AERIE_HAS_AMX
AERIE_ATTENTION(aerie_attention_bf16_amx, uint16_t, aerie::Products::kTiles)
#endif
#if AERIE_HAS_DOTS
AERIE_ATTENTION(aerie_attention_bf16_dots, uint16_t, aerie::Products::kDots)
#endif

}  // extern "C"
