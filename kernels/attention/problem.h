// The arguments of attention, and the layout of a query's keys.
//
// The keys of a row are cut into spans of 256 cache positions, counted from position 0, and within
// a span into groups of 16 for scores. In a tree with branches, the path of a query is treated as
// if it followed the prefix without gaps, as in plain decoding: the j-th entry that the query sees
// takes position prefix + j, whatever slot holds it. So the result has the bits of plain decoding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../linear/panels.h"
#include "../native/vector.h"

namespace aerie {

constexpr int64_t kSpan = 256;       // keys per partial result
constexpr int kGroup = 16;           // keys whose scores are summed together
constexpr int64_t kMaxQueryRows = 64;     // query rows (query x head) of one tile
constexpr int64_t kMaxEntries = 64;  // suffix entries that a mask can name
constexpr int64_t kMaxColumns = kSpan + kMaxEntries;
constexpr int64_t kMaxHeadDim = 256;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// How numbers are multiplied: widened to float32, on AMX tiles, or by bfloat16 dot products.
enum class Products { kFloats, kTiles, kDots };

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
  float scale;                   // of the scores
  float value_scale;             // of the results
  float* out;                    // [T, Hq, D]
  Products products;

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t queries_per_tile() const { return std::max<int64_t>(1, kMaxQueryRows / group()); }
  uint64_t mask(int64_t row, int64_t query) const {
    return static_cast<uint64_t>(ancestors[cu_q[row] + query]);
  }
};

// Some consecutive queries of one row, with the query heads of one KV head.
struct Tile {
  int64_t row, kv_head, first_query, num_queries;  // first_query counts from the row's first
  uint64_t entries;  // suffix entries that its queries see, if one skips an entry; else 0
};

// The result over the keys of one span, or of all spans so far, for one query head.
struct Partial {
  float maximum, sum;
  float* values;  // [D]
};

// The keys of one span, in the order of their multiplication, and their scores.
struct Workspace {
  int64_t slots[kMaxColumns];
  alignas(64) float keys[kGroup * kMaxHeadDim];
  alignas(64) float scores[kMaxQueryRows][kMaxColumns];  // of the tile's rows; later the weights
};

// The spans of a row: span s holds the keys at positions begin(s) .. end(s)-1.
struct Spans {
  int64_t first_key, end_key;  // of all spans

  int64_t first() const { return first_key / kSpan; }
  int64_t last() const { return (end_key + kSpan - 1) / kSpan; }  // one after the last span
  int64_t begin(int64_t s) const { return std::max(s * kSpan, first_key); }
  int64_t end(int64_t s) const { return std::min((s + 1) * kSpan, end_key); }
};

// The columns of a span: first positions begin .. begin + direct - 1, each in its own column. If
// paths branch, all entries of the tile follow, and each query uses those on its path.
struct Columns {
  int64_t begin, end;     // positions
  int64_t direct, count;  // columns
  bool branch;

  int64_t positions() const { return end - begin; }
};

// The entries of a path that fall into a span: entry i takes position begin + direct + i.
struct PathPart {
  int64_t count = 0;
  uint8_t column[kMaxEntries];  // counted from the first after the direct ones
};

// Entries seen by the queries of a tile if one of them skips an entry, else 0.
template <class C>
uint64_t branching_entries(const Problem<C>& p, int64_t row, int64_t first, int64_t count) {
  uint64_t entries = 0;
  bool skips = false;
  for (int64_t q = first; q < first + count; ++q) {
    const uint64_t mask = p.mask(row, q);
    entries |= mask;
    skips |= (mask & (mask + 1)) != 0;
  }
  return skips ? entries : 0;
}

template <class C>
Spans spans_of(const Problem<C>& p, const Tile& tile) {
  int64_t most = 0;  // suffix entries seen
  for (int64_t q = tile.first_query; q < tile.first_query + tile.num_queries; ++q) {
    const uint64_t mask = p.mask(tile.row, q);
    most = std::max<int64_t>(most, mask == 0 ? q + 1 : __builtin_popcountll(mask));
  }
  return {p.first_keys[tile.row], p.prefix_lens[tile.row] + most};
}

template <class C>
Columns columns_of(const Problem<C>& p, const Tile& tile, int64_t begin, int64_t end) {
  const int64_t prefix = p.prefix_lens[tile.row];
  if (tile.entries == 0 || end <= prefix) return {begin, end, end - begin, end - begin, false};
  const int64_t direct = std::max<int64_t>(prefix - begin, 0);
  return {begin, end, direct, direct + __builtin_popcountll(tile.entries), true};
}

template <class C>
PathPart path_part(const Problem<C>& p, const Tile& tile, int64_t query, const Columns& columns) {
  PathPart part;
  int64_t position = p.prefix_lens[tile.row];
  for (uint64_t left = p.mask(tile.row, query); left; left &= left - 1, ++position) {
    if (position < columns.begin || position >= columns.end) continue;
    const uint64_t before = (left & -left) - 1;
    part.column[part.count++] = static_cast<uint8_t>(__builtin_popcountll(tile.entries & before));
  }
  return part;
}

// The keys position .. position+15 that a query of the row sees, as bits.
template <class C>
uint32_t visible_bits(const Problem<C>& p, int64_t row, int64_t query, int64_t position) {
  const int64_t prefix = p.prefix_lens[row], offset = position - prefix;
  const uint64_t mask = p.mask(row, query);
  if (mask == 0) {  // causal: entries up to the query itself
    const int64_t count = std::clamp<int64_t>(query - offset + 1, 0, kGroup);
    return (1u << count) - 1;
  }
  if (offset >= 0) return offset < 64 ? (mask >> offset) & 0xffff : 0;
  const int64_t in_prefix = std::min<int64_t>(-offset, kGroup);
  return ((mask << in_prefix) | ((1u << in_prefix) - 1)) & 0xffff;
}

// Scale the scores of the sixteen columns from `column` and hide those that a query does not see.
// take_path hides the entries of branching paths.
template <class C>
AERIE_INLINE F16 visible_scores(const Problem<C>& p, const Tile& tile, int64_t r,
                                const Columns& columns, int64_t column, F16 scores) {
  scores = scores * broadcast(p.scale);
  const int64_t position = columns.begin + column, count = columns.count - column;
  if (count >= kGroup && position + kGroup <= p.prefix_lens[tile.row]) return scores;
  if (columns.branch) return scores;
  uint32_t bits = visible_bits(p, tile.row, tile.first_query + r / p.group(), position);
  if (count < kGroup) bits &= (1u << count) - 1;
  return masked_lanes(scores, bits, broadcast(kMinusInfinity));
}

// Move the scores of a path from their columns to their positions. Entries of a path ascend, so
// none is overwritten before it is read.
inline void take_path(const PathPart& part, const Columns& columns, float* scores) {
  float* to = scores + columns.direct;
  for (int64_t i = 0; i < part.count; ++i) to[i] = to[part.column[i]];
  const int64_t taken = columns.direct + part.count;
  const int64_t padded = round_up(columns.positions(), kGroup);
  if (taken < padded) std::fill(scores + taken, scores + padded, kMinusInfinity);
}

// Move the weights of a path back to its columns; other columns get weight zero.
inline void return_path(const PathPart& part, const Columns& columns, float* weights) {
  float* to = weights + columns.direct;
  float own[kMaxEntries];
  std::copy_n(to, part.count, own);
  std::fill(to, weights + columns.count, 0.0f);
  for (int64_t i = 0; i < part.count; ++i) to[part.column[i]] = own[i];
}

template <class C>
int64_t slot_of(const Problem<C>& p, int64_t row, int64_t position) {
  const int64_t block = p.block_tables[row * p.max_blocks + position / p.block_size];
  return block * p.block_size + position % p.block_size;
}

// The cache slot of each column.
template <class C>
void find_slots(const Problem<C>& p, const Tile& tile, const Columns& columns, int64_t* slots) {
  const int32_t* table =
      p.block_tables + tile.row * p.max_blocks + columns.begin / p.block_size;
  int64_t offset = columns.begin % p.block_size;
  for (int64_t k = 0; k < columns.direct; ++k) {
    slots[k] = *table * p.block_size + offset;
    if (++offset == p.block_size) ++table, offset = 0;
  }
  if (!columns.branch) return;
  int64_t* to = slots + columns.direct;
  for (uint64_t left = tile.entries; left; left &= left - 1)
    *to++ = slot_of(p, tile.row, p.prefix_lens[tile.row] + __builtin_ctzll(left));
}

template <class C>
const float* query_row(const Problem<C>& p, const Tile& tile, int64_t r) {
  const int64_t t = p.cu_q[tile.row] + tile.first_query + r / p.group();
  return p.queries + (t * p.num_heads + tile.kv_head * p.group() + r % p.group()) * p.D;
}

// Turn the scores of one row into weights exp(score - maximum); lanes from `count` on are -inf.
inline void weigh(float* scores, int64_t count, Partial& partial) {
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

// Weights of one row for one span; all zero when it sees none of the keys.
inline void weigh_row(float* scores, int64_t count, Partial& partial) {
  weigh(scores, count, partial);
  if (partial.sum == 0) std::fill_n(scores, round_up(count, kGroup), 0.0f);
}

}  // namespace aerie
