// The steps between the forwards of a draft head, see reference.py. One thread does such small work.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../native/pool.h"

namespace {

// As first_keys in reference.py; `window` is negative if there is none.
int32_t first_key(int32_t first, int64_t prefix_len, int64_t window) {
  const int64_t seen = window < 0 ? first : std::max<int64_t>(first, prefix_len - window);
  return static_cast<int32_t>(std::min(seen, prefix_len));
}

}  // namespace

extern "C" {

// By row, [B]: the lengths are int64 if `wide`, else int32.
void aerie_first_keys(aerie::Pool*, const int32_t* firsts, const int64_t* lines, const void* lens,
                      int64_t wide, int64_t B, int64_t window, int32_t* out) {
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = wide ? static_cast<const int64_t*>(lens)[b]
                                : static_cast<const int32_t*>(lens)[b];
    out[b] = first_key(firsts[lines[b]], length, window);
  }
}

// The fields of RootStates -> those of ReadyRoots (kernels/drafting/nodes.py).
void aerie_ready_roots(aerie::Pool*, const int64_t* lines, const int64_t* positions,
                       const int64_t* max_nodes, const float* states,
                       const int64_t* state_positions, const int32_t* firsts, int64_t B, int64_t H,
                       int64_t num_drafted, int64_t window, float* own_states, bool* ready,
                       bool* faults, int64_t* num_slots, int32_t* first_keys, int64_t* sizes) {
  for (int64_t b = 0; b < B; ++b, own_states += H) {
    const float* state = states + lines[b] * H;
    std::memcpy(own_states, state, H * sizeof(float));
    const bool drafts = max_nodes[b] > 1;
    const bool wanted = drafts && state_positions[lines[b]] == positions[b];
    const bool sound = std::all_of(state, state + H, [](float x) { return std::isfinite(x); });
    ready[b] = wanted && sound;
    faults[b] = wanted && !sound;
    num_slots[b] = drafts ? std::max(num_drafted, max_nodes[b]) : max_nodes[b];
    first_keys[b] = first_key(firsts[lines[b]], positions[b], window);
    sizes[b] = ready[b] ? max_nodes[b] : std::min<int64_t>(max_nodes[b], 1);
  }
}

// Rows last[b] of states [C, H] -> rows lines[b] of kept_states, and their positions.
void aerie_keep_states(aerie::Pool*, float* kept_states, int64_t* kept_positions,
                       const int64_t* lines, const float* states, const int64_t* last,
                       const int64_t* newest, int64_t B, int64_t H) {
  for (int64_t b = 0; b < B; ++b) {
    std::memcpy(kept_states + lines[b] * H, states + last[b] * H, H * sizeof(float));
    kept_positions[lines[b]] = newest[b];
  }
}

// The fields of LevelNodes and RowPlaces -> those of LaidNodes, whose levels begin at multiples of
// `spread`, the number of rows as an even number. The outputs [M * spread] are zeros before.
void aerie_lay_levels(aerie::Pool*, const int64_t* nodes, const int64_t* depths,
                      const int64_t* masks, const int64_t* firsts, const int64_t* widths, int64_t M,
                      const int64_t* roots, const int64_t* num_slots, const int32_t* tables,
                      int64_t B, int64_t columns, int64_t block_size, int64_t first_scratch,
                      int64_t max_len, int64_t spread, int64_t* positions, int64_t* slots,
                      int64_t* own_masks) {
  for (int64_t b = 0; b < B; ++b, tables += columns) {
    for (int64_t m = 0; m < M; ++m) {
      const int64_t at = firsts[m] * spread + b * widths[m] + m - firsts[m];
      const int64_t place = roots[b] + nodes[m];
      const int64_t block = tables[std::min(place / block_size, columns - 1)];
      const bool alive = nodes[m] < num_slots[b];
      positions[at] = std::min(roots[b] + depths[m], max_len - 1);
      slots[at] = alive ? block * block_size + place % block_size
                        : first_scratch + nodes[m] % block_size;
      own_masks[at] = alive ? masks[m] : 1;
    }
  }
}

}  // extern "C"
