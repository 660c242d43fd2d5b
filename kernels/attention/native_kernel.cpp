// Attention over a paged prefix and a causal or tree-shaped suffix (flash attention on a CPU).
//
// The keys of a row are cut into spans of 256 cache positions, counted from position 0. Each span
// gives a partial result (maximum, sum, weighted values) per query head; partial results merge in
// ascending order. A query therefore gets the same bits whether it comes alone, within a prompt
// chunk of any size, or with many rows beside it, and whichever threads do the spans.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../native/pool.h"
#include "../native/vector.h"
#include "amx_kernel.h"

namespace aerie {
namespace {

constexpr int64_t kSpan = 256;       // keys per partial result
constexpr int kGroup = 16;           // keys whose scores are summed together
constexpr int64_t kMaxRows = 64;     // query rows (query x head) of one tile
constexpr int64_t kMaxHeadDim = 256;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <class C>
struct Problem {
  const float* queries;          // [T, Hq, D]
  const C* keys;                 // [num_blocks, S, Hkv, D]
  const C* values;
  const int32_t* cu_q;           // [B + 1]
  const int32_t* prefix_lens;    // [B]
  const int32_t* first_keys;     // [B]
  const int32_t* block_tables;   // [B, max_blocks]
  const int64_t* ancestors;      // [T]
  int64_t num_rows, max_blocks, block_size, num_heads, num_kv_heads, D;
  float scale;
  float* out;                    // [T, Hq, D]
  bool on_tiles;                 // use AMX

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t queries_per_tile() const { return std::max<int64_t>(1, kMaxRows / group()); }
};

// Some consecutive queries of one row, with the heads of one KV head.
struct Tile {
  int64_t row, kv_head, first_query, num_queries;  // first_query counts from the row's first
};

// What the keys of one span, or of all spans so far, add up to for one query head.
struct Partial {
  float maximum, sum;
  float* values;  // [D]
};

struct Workspace {
  int64_t slots[kSpan];  // of the span's keys
  alignas(64) float keys[kGroup * kMaxHeadDim];
  alignas(64) float scores[kMaxRows][kSpan];  // of the tile's rows, later weights
};

// Keys of the spans of a row: span s holds positions begin(s) .. end(s)-1.
struct Spans {
  int64_t first_key, end_key;  // of all

  int64_t first() const { return first_key / kSpan; }
  int64_t last() const { return (end_key + kSpan - 1) / kSpan; }  // one behind
  int64_t begin(int64_t s) const { return std::max(s * kSpan, first_key); }
  int64_t end(int64_t s) const { return std::min((s + 1) * kSpan, end_key); }
};

template <class C>
int64_t num_visible(const Problem<C>& p, const Tile& tile) {
  const int64_t first = p.cu_q[tile.row], prefix = p.prefix_lens[tile.row];
  int64_t most = 0;
  for (int64_t q = tile.first_query; q < tile.first_query + tile.num_queries; ++q) {
    const uint64_t mask = static_cast<uint64_t>(p.ancestors[first + q]);
    const int64_t suffix = mask == 0 ? q + 1 : 64 - __builtin_clzll(mask);
    most = std::max(most, prefix + suffix);
  }
  return most;
}

template <class C>
Spans spans_of(const Problem<C>& p, const Tile& tile) {
  return {p.first_keys[tile.row], num_visible(p, tile)};
}

// Which of the keys position .. position+15 a query of the row sees, as bits.
template <class C>
uint32_t visible_bits(const Problem<C>& p, int64_t row, int64_t query, int64_t position) {
  const int64_t prefix = p.prefix_lens[row], offset = position - prefix;
  const uint64_t mask = static_cast<uint64_t>(p.ancestors[p.cu_q[row] + query]);
  if (mask == 0) {  // causal: entries up to the query itself
    const int64_t count = std::clamp<int64_t>(query - offset + 1, 0, kGroup);
    return (1u << count) - 1;
  }
  if (offset >= 0) return offset < 64 ? (mask >> offset) & 0xffff : 0;
  const int64_t in_prefix = std::min<int64_t>(-offset, kGroup);
  return ((mask << in_prefix) | ((1u << in_prefix) - 1)) & 0xffff;
}

// Scale the scores of sixteen keys and hide those that a query does not see.
template <class C>
AERIE_INLINE F16 visible_scores(const Problem<C>& p, const Tile& tile, int64_t r,
                                int64_t position, int64_t count, F16 scores) {
  scores = scores * broadcast(p.scale);
  if (count >= kGroup && position + kGroup <= p.prefix_lens[tile.row]) return scores;
  uint32_t bits = visible_bits(p, tile.row, tile.first_query + r / p.group(), position);
  if (count < kGroup) bits &= (1u << count) - 1;
  return masked_lanes(scores, bits, broadcast(kMinusInfinity));
}

// Slots of the cache positions begin .. end-1.
template <class C>
void find_slots(const Problem<C>& p, int64_t row, int64_t begin, int64_t end, int64_t* slots) {
  const int32_t* table = p.block_tables + row * p.max_blocks + begin / p.block_size;
  int64_t offset = begin % p.block_size;
  for (int64_t k = 0; k < end - begin; ++k) {
    slots[k] = *table * p.block_size + offset;
    if (++offset == p.block_size) ++table, offset = 0;
  }
}

// The keys of one KV head in `count` slots as floats, zeros up to sixteen.
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

// The products of one query with sixteen keys. D is a multiple of 16 here.
AERIE_INLINE F16 scores_of(const float* query, const float* keys, int64_t D) {
  F16 products[kGroup];
  AERIE_UNROLL for (int k = 0; k < kGroup; ++k) products[k] = F16{};
  for (int64_t d = 0; d < D; d += 16) {
    const F16 part = load(query + d);
    AERIE_UNROLL for (int k = 0; k < kGroup; ++k)
      products[k] = multiply_add(part, load(keys + k * D + d), products[k]);
  }
  return sum_each(products);
}

// Any other head dimension.
inline F16 scores_of_odd(const float* query, const float* keys, int64_t D) {
  float sums[kGroup];
  for (int k = 0; k < kGroup; ++k) {
    sums[k] = 0;
    for (int64_t d = 0; d < D; ++d) sums[k] += query[d] * keys[k * D + d];
  }
  return load(sums);
}

template <class C>
const float* query_row(const Problem<C>& p, const Tile& tile, int64_t r) {
  const int64_t t = p.cu_q[tile.row] + tile.first_query + r / p.group();
  return p.queries + (t * p.num_heads + tile.kv_head * p.group() + r % p.group()) * p.D;
}

// Scores of all tile rows against the keys begin .. end-1 of one span; -inf where not visible.
template <class C>
void score_span(const Problem<C>& p, const Tile& tile, int64_t begin, int64_t end,
                Workspace& work) {
  const int64_t rows = tile.num_queries * p.group();
  for (int64_t position = begin; position < end; position += kGroup) {
    const int64_t count = std::min<int64_t>(kGroup, end - position);
    gather_keys(p, tile.kv_head, work.slots + (position - begin), count, work.keys);
    for (int64_t r = 0; r < rows; ++r) {
      const float* query = query_row(p, tile, r);
      const F16 scores = p.D % 16 == 0 ? scores_of(query, work.keys, p.D)
                                       : scores_of_odd(query, work.keys, p.D);
      store(work.scores[r] + (position - begin),
            visible_scores(p, tile, r, position, count, scores));
    }
  }
}

// Turn the scores of one row into weights exp(score - maximum); lanes behind `count` are -inf.
void weigh(float* scores, int64_t count, Partial& partial) {
  F16 highest = broadcast(kMinusInfinity), total{};
  for (int64_t k = 0; k < count; k += kGroup) highest = maximum(highest, load(scores + k));
  partial.maximum = maximum_of_lanes(highest);
  partial.sum = 0;
  if (partial.maximum == kMinusInfinity) return;
  const F16 shift = broadcast(partial.maximum);
  for (int64_t k = 0; k < count; k += kGroup) {
    const F16 weights = exponential(load(scores + k) - shift);
    store(scores + k, weights);
    total = total + weights;
  }
  partial.sum = sum_lanes(total);
}

// Weighted sums of Rows x 16 Columns of the values, keys in ascending order.
template <int Rows, int Columns, class C>
AERIE_INLINE void mix(const Problem<C>& p, int64_t kv_head, int64_t num_keys, int64_t first_row,
                      int64_t d, const Workspace& work, Partial* partials) {
  F16 sums[Rows][Columns];
  AERIE_UNROLL for (int r = 0; r < Rows; ++r)
    AERIE_UNROLL for (int c = 0; c < Columns; ++c) sums[r][c] = F16{};
  for (int64_t k = 0; k < num_keys; ++k) {
    // A key that no row sees may hold anything, NaN too.
    bool seen = false;
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) seen |= work.scores[first_row + r][k] != 0;
    if (!seen) continue;
    const C* value = p.values + (work.slots[k] * p.num_kv_heads + kv_head) * p.D + d;
    F16 columns[Columns];
    AERIE_UNROLL for (int c = 0; c < Columns; ++c) columns[c] = load(value + c * 16);
    AERIE_UNROLL for (int r = 0; r < Rows; ++r) {
      const F16 weight = broadcast(work.scores[first_row + r][k]);
      AERIE_UNROLL for (int c = 0; c < Columns; ++c)
        sums[r][c] = multiply_add(weight, columns[c], sums[r][c]);
    }
  }
  AERIE_UNROLL for (int r = 0; r < Rows; ++r)
    AERIE_UNROLL for (int c = 0; c < Columns; ++c)
      store(partials[first_row + r].values + d + c * 16, sums[r][c]);
}

template <int Rows, class C>
void mix_columns(const Problem<C>& p, int64_t kv_head, int64_t num_keys, int64_t row,
                 const Workspace& work, Partial* partials) {
  int64_t d = 0;
  for (; d + 64 <= p.D && kLanes == 16; d += 64)
    mix<Rows, 4>(p, kv_head, num_keys, row, d, work, partials);
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

// Weights of one row for one span; all zero when it sees none of the keys.
void weigh_row(float* scores, int64_t count, Partial& partial) {
  weigh(scores, count, partial);
  if (partial.sum == 0) std::fill_n(scores, round_up(count, kGroup), 0.0f);
}

#if AERIE_HAS_AMX

// Operands of one span in the order of tiles.
struct TileWorkspace {
  alignas(64) uint16_t queries[kMaxRows * kMaxHeadDim];
  alignas(64) uint16_t keys[kSpan * kMaxHeadDim];
  alignas(64) uint16_t values[kSpan * kMaxHeadDim];
  alignas(64) uint16_t weights[kMaxRows * kSpan];
  alignas(64) float mixed[kTileRows * 32];
  const uint16_t* key_at[kSpan];  // null where no query of the tile looks
  const uint16_t* value_at[kSpan];
};

// Keys of the suffix that some query of a tile sees.
struct SeenSuffix {
  int64_t causal = 0;  // entries 0 .. causal-1
  uint64_t mask = 0;   // and these

  bool contains(int64_t i) const { return i < causal || (i < 64 && (mask >> i & 1)); }
};

SeenSuffix seen_suffix(const Problem<uint16_t>& p, const Tile& tile) {
  SeenSuffix seen;
  for (int64_t q = tile.first_query; q < tile.first_query + tile.num_queries; ++q) {
    const auto mask = static_cast<uint64_t>(p.ancestors[p.cu_q[tile.row] + q]);
    if (mask) seen.mask |= mask;
    else seen.causal = std::max(seen.causal, q + 1);
  }
  return seen;
}

void locate(const Problem<uint16_t>& p, const Tile& tile, int64_t begin, int64_t end,
            const Workspace& work, TileWorkspace& tiles) {
  const SeenSuffix seen = seen_suffix(p, tile);
  const int64_t prefix = p.prefix_lens[tile.row];
  for (int64_t k = 0; k < kSpan; ++k) {
    const int64_t position = begin + k;
    const bool used = position < end && (position < prefix || seen.contains(position - prefix));
    const int64_t at = used ? (work.slots[k] * p.num_kv_heads + tile.kv_head) * p.D : 0;
    tiles.key_at[k] = used ? p.keys + at : nullptr;
    tiles.value_at[k] = used ? p.values + at : nullptr;
  }
}

void pack_operands(const Problem<uint16_t>& p, const Tile& tile, int64_t rows, int64_t count,
                   TileWorkspace& tiles) {
  const int64_t chunks = p.D / kTileK;
  for (int64_t r = 0; r < round_up(rows, kTileRows); ++r)
    for (int64_t d = 0; d < p.D; d += 16) {
      uint16_t* to = tiles.queries + (r / kTileRows * chunks + d / kTileK) * kTileElements +
                     r % kTileRows * kTileK + d % kTileK;
      if (r < rows) store_rounded(to, query_row(p, tile, r) + d);
      else std::fill_n(to, 16, uint16_t{0});
    }
  for (int64_t k = 0; k < count; k += kGroup)
    for (int64_t c = 0; c < chunks; ++c)
      pack_keys(reinterpret_cast<const uint16_t* const(&)[16]>(tiles.key_at[k]), c * kTileK,
                tiles.keys + (k / kGroup * chunks + c) * kTileElements);
  for (int64_t k = 0; k < count; k += kTileK)
    for (int64_t d = 0; d < p.D; d += 16)
      pack_values(tiles.value_at + k, d,
                  tiles.values + (k / kTileK * (p.D / 16) + d / 16) * kTileElements);
}

// Mask, weigh and round the scores of rows first .. last-1.
void round_weights(const Problem<uint16_t>& p, const Tile& tile, int64_t first, int64_t last,
                   int64_t begin, int64_t end, Workspace& work, TileWorkspace& tiles,
                   Partial* partials) {
  const int64_t count = end - begin;
  for (int64_t r = first; r < last; ++r) {
    for (int64_t k = 0; k < count; k += kGroup) {
      float* at = work.scores[r] + k;
      store(at, visible_scores(p, tile, r, begin + k, count - k, load(at)));
    }
    weigh_row(work.scores[r], count, partials[r]);
    uint16_t* to = tiles.weights + r * kSpan;
    for (int64_t k = 0; k < count; k += kGroup) store_rounded(to + k, work.scores[r] + k);
    for (int64_t k = round_up(count, kGroup); k < round_up(count, kTileK); ++k) to[k] = 0;
  }
}

void attend_span_amx(const Problem<uint16_t>& p, const Tile& tile, int64_t begin, int64_t end,
                     Workspace& work, Partial* partials) {
  thread_local TileWorkspace tiles;
  const int64_t rows = tile.num_queries * p.group(), count = end - begin;
  const int64_t chunks = p.D / kTileK, blocks = round_up(count, kTileK) / kTileK;
  find_slots(p, tile.row, begin, end, work.slots);
  locate(p, tile, begin, end, work, tiles);
  pack_operands(p, tile, rows, count, tiles);
  configure_full_tiles();
  for (int64_t r = 0; r < rows; r += kTileRows) {  // sixteen rows of scores fit the L1 cache
    const int64_t last = std::min(r + kTileRows, rows);
    multiply_keys(tiles.queries + r * p.D, tiles.keys, round_up(count, kGroup) / kGroup, chunks,
                  work.scores[r], kSpan);
    round_weights(p, tile, r, last, begin, end, work, tiles, partials);
    for (int64_t d = 0; d < p.D; d += 32) {
      multiply_values(tiles.weights + r * kSpan, kSpan, tiles.values + d / 16 * kTileElements,
                      blocks, p.D / 16, tiles.mixed);
      for (int64_t i = r; i < last; ++i)
        std::copy_n(tiles.mixed + (i - r) * 32, 32, partials[i].values + d);
    }
  }
  _tile_release();
}

#endif

// One span of keys for all rows of a tile.
template <class C>
void attend_span(const Problem<C>& p, const Tile& tile, int64_t begin, int64_t end,
                 Workspace& work, Partial* partials) {
#if AERIE_HAS_AMX
  if constexpr (std::is_same_v<C, uint16_t>)
    if (p.on_tiles && p.D % kTileK == 0)
      return attend_span_amx(p, tile, begin, end, work, partials);
#endif
  const int64_t rows = tile.num_queries * p.group();
  find_slots(p, tile.row, begin, end, work.slots);
  score_span(p, tile, begin, end, work);
  for (int64_t r = 0; r < rows; ++r) weigh_row(work.scores[r], end - begin, partials[r]);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) mix_columns<4>(p, tile.kv_head, end - begin, r, work, partials);
  if (rows - r == 3) mix_columns<3>(p, tile.kv_head, end - begin, r, work, partials);
  if (rows - r == 2) mix_columns<2>(p, tile.kv_head, end - begin, r, work, partials);
  if (rows - r == 1) mix_columns<1>(p, tile.kv_head, end - begin, r, work, partials);
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
    for (int64_t d = 0; d < p.D; ++d) to[d] = totals[r].values[d] / totals[r].sum;
  }
}

// All spans of a tile, one after the other.
template <class C>
void attend_tile(const Problem<C>& p, const Tile& tile) {
  thread_local Workspace work;
  alignas(64) float buffers[2][kMaxRows][kMaxHeadDim];
  Partial totals[kMaxRows], spans[kMaxRows];
  const int64_t rows = tile.num_queries * p.group();
  const Spans keys = spans_of(p, tile);
  for (int64_t r = 0; r < rows; ++r) {
    totals[r] = {kMinusInfinity, 0, buffers[0][r]};
    spans[r] = {kMinusInfinity, 0, buffers[1][r]};
  }
  for (int64_t s = keys.first(); s < keys.last(); ++s) {
    attend_span(p, tile, keys.begin(s), keys.end(s), work, spans);
    for (int64_t r = 0; r < rows; ++r) merge(totals[r], spans[r], p.D);
  }
  write_out(p, tile, totals);
}

// Few tiles over many keys: the spans are the tasks, and their results are merged afterwards.
template <class C>
void attend_spans(Pool& pool, const Problem<C>& p, const std::vector<Tile>& tiles) {
  std::vector<int64_t> first_span(tiles.size() + 1);
  const auto keys_of_tile = [&](size_t i) { return spans_of(p, tiles[i]); };
  for (size_t i = 0; i < tiles.size(); ++i)
    first_span[i + 1] = first_span[i] + keys_of_tile(i).last() - keys_of_tile(i).first();
  const int64_t num_spans = first_span.back(), row_size = p.D;
  float* values = pool.scratch<float>(0, num_spans * kMaxRows * row_size);
  Partial* partials = pool.scratch<Partial>(1, num_spans * kMaxRows);
  for (int64_t i = 0; i < num_spans * kMaxRows; ++i)
    partials[i] = {kMinusInfinity, 0, values + i * row_size};
  pool.run(num_spans, [&](int64_t task) {
    thread_local Workspace work;
    const size_t i = std::upper_bound(first_span.begin(), first_span.end(), task) -
                     first_span.begin() - 1;
    const Spans keys = keys_of_tile(i);
    const int64_t s = keys.first() + task - first_span[i];
    attend_span(p, tiles[i], keys.begin(s), keys.end(s), work, partials + task * kMaxRows);
  });
  pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    Partial* totals = partials + first_span[i] * kMaxRows;
    const int64_t rows = tiles[i].num_queries * p.group();
    for (int64_t task = first_span[i] + 1; task < first_span[i + 1]; ++task)
      for (int64_t r = 0; r < rows; ++r) merge(totals[r], partials[task * kMaxRows + r], p.D);
    write_out(p, tiles[i], totals);
  });
}

template <class C>
void attention(Pool& pool, const Problem<C>& p) {
  std::vector<Tile> tiles;
  int64_t longest = 0;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t queries = p.cu_q[row + 1] - p.cu_q[row];
    longest = std::max<int64_t>(longest, p.prefix_lens[row] + queries);
    for (int64_t q = 0; q < queries; q += p.queries_per_tile())
      for (int64_t h = 0; h < p.num_kv_heads; ++h)
        tiles.push_back({row, h, q, std::min(p.queries_per_tile(), queries - q)});
  }
  const bool few = static_cast<int64_t>(tiles.size()) < 8 * pool.num_threads();
  if (few && longest > kSpan) return attend_spans(pool, p, tiles);
  pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t i) { attend_tile(p, tiles[i]); });
}

}  // namespace
}  // namespace aerie

extern "C" {

// Shapes as in Problem; ancestors as in AttentionMeta.
#define AERIE_ATTENTION(NAME, CACHE, ON_TILES)                                                   \
  void NAME(aerie::Pool* pool, const float* queries, const CACHE* keys, const CACHE* values,     \
            const int32_t* cu_q, const int32_t* prefix_lens, const int32_t* first_keys,          \
            int64_t num_rows, const int32_t* block_tables, const int64_t* ancestors,             \
            int64_t max_blocks, int64_t block_size, int64_t num_heads, int64_t num_kv_heads,     \
            int64_t D, float scale, float* out) {                                                \
    aerie::attention<CACHE>(*pool, {queries, keys, values, cu_q, prefix_lens, first_keys,        \
                                    block_tables, ancestors, num_rows, max_blocks, block_size,   \
                                    num_heads, num_kv_heads, D, scale, out, ON_TILES});          \
  }

AERIE_ATTENTION(aerie_attention_f32, float, false)
AERIE_ATTENTION(aerie_attention_bf16, uint16_t, false)
#if AERIE_HAS_AMX
AERIE_ATTENTION(aerie_attention_bf16_amx, uint16_t, true)
#endif

}  // extern "C"
