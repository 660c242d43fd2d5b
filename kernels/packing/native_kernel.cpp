// Packs the nodes of a step and what rows commit, see nodes.py and entries.py. One thread does such
// small work.

#include <algorithm>
#include <cstdint>

#include "../native/pool.h"

namespace {

// What is known of each node: the rows of a matrix [8, R].
struct NodeParts {
  int64_t *row_of, *place, *tokens, *positions, *slots, *ancestors, *seeds, *draw_positions;

  NodeParts(int64_t* all, int64_t R)
      : row_of(all),
        place(all + R),
        tokens(all + 2 * R),
        positions(all + 3 * R),
        slots(all + 4 * R),
        ancestors(all + 5 * R),
        seeds(all + 6 * R),
        draw_positions(all + 7 * R) {}
};

int64_t slot_of(const int32_t* table, int64_t position, int64_t block_size) {
  return int64_t{table[position / block_size]} * block_size + position % block_size;
}

}  // namespace

extern "C" {

// The fields of NodeTrees -> those of PackedNodes, without filters.
void aerie_pack_nodes(aerie::Pool*, const int64_t* starts, const int64_t* limits,
                      const int64_t* sizes, const int64_t* tokens, const int64_t* depths,
                      const int64_t* ancestors, const int32_t* tables, const int64_t* seeds,
                      const float* temperatures, int64_t B, int64_t N, int64_t columns,
                      int64_t block_size, int64_t first_scratch, int64_t max_len, int64_t R,
                      int64_t* cu, int32_t* cu_q, int32_t* prefix_lens, int64_t* nodes,
                      float* node_temperatures, bool* used, int64_t* at, bool* inside) {
  std::fill_n(nodes, 8 * R, 0);
  std::fill_n(node_temperatures, R, 0.0f);
  const NodeParts to(nodes, R);
  int64_t i = 0;
  cu[0] = cu_q[0] = 0;
  for (int64_t b = 0; b < B; ++b, tables += columns, at += N, inside += N) {
    const int64_t start = starts[b], size = limits[b] > 0 ? sizes[b] : 0;
    prefix_lens[b] = static_cast<int32_t>(start);
    for (int64_t n = 0; n < N; ++n) {
      at[n] = n < size ? i + n : 0;
      inside[n] = n < size;
    }
    for (int64_t n = 0; n < size; ++n, ++i) {
      const int64_t from = b * N + n, position = start + depths[from];
      to.row_of[i] = b;
      to.place[i] = n;
      to.tokens[i] = tokens[from];
      to.positions[i] = std::clamp<int64_t>(position, 0, max_len - 1);
      to.slots[i] = slot_of(tables, start + n, block_size);
      to.ancestors[i] = size > 1 ? ancestors[from] : 0;
      to.seeds[i] = seeds[b];
      to.draw_positions[i] = position + 1;
      node_temperatures[i] = temperatures[b];
    }
    cu[b + 1] = i;
    cu_q[b + 1] = static_cast<int32_t>(i);
  }
  for (int64_t k = 0; k < R; ++k) used[k] = k < i;
  for (; i < R; ++i) to.slots[i] = first_scratch + i % block_size;
}

// The fields of Walks -> those of PackedEntries.
void aerie_pack_entries(aerie::Pool*, const int64_t* starts, const int64_t* lens,
                        const int64_t* ends, const bool* samples, const int64_t* next_tokens,
                        const int64_t* path, const int64_t* accepted, const int64_t* emitted,
                        const int64_t* firsts, const int32_t* tables, int64_t B, int64_t E,
                        int64_t columns, int64_t block_size, int64_t first_scratch, int64_t* cu,
                        int32_t* cu_q, int32_t* prefix_lens, int64_t* last, int64_t* newest,
                        int64_t* features, int64_t* tokens, int64_t* positions, int64_t* slots) {
  int64_t at = 0;
  cu[0] = cu_q[0] = 0;
  for (int64_t b = 0; b < B; ++b, path += E, emitted += E, tables += columns) {
    const int64_t wanted = lens[b] + (samples[b] ? accepted[b] : 0);
    const int64_t count = std::min(wanted, std::max<int64_t>(ends[b] - starts[b] - 1, 0));
    for (int64_t place = 0; place < count; ++place, ++at) {
      const int64_t position = starts[b] + 1 + place;
      const int64_t token = place == 0 && !samples[b] ? next_tokens[b] : emitted[place];
      features[at] = firsts[b] + std::max<int64_t>(path[place], 0);
      tokens[at] = std::max<int64_t>(token, 0);
      positions[at] = position;
      slots[at] = slot_of(tables, position, block_size);
    }
    cu[b + 1] = at;
    cu_q[b + 1] = static_cast<int32_t>(at);
    prefix_lens[b] = count ? static_cast<int32_t>(starts[b] + 1) : 0;
    last[b] = std::max<int64_t>(at - 1, 0);
    newest[b] = count ? starts[b] + count : -1;
  }
  for (; at < B * E; ++at) {
    features[at] = tokens[at] = positions[at] = 0;
    slots[at] = first_scratch + at % block_size;
  }
}

}  // extern "C"
