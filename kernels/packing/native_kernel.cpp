// Packs what rows commit, see entries.py. One thread does such small work.

#include <algorithm>
#include <cstdint>

#include "../native/pool.h"

extern "C" {

// The fields of Walks -> those of PackedEntries, without padding. There is room for B * E entries; at
// the end, cu[B] is their number.
void aerie_pack_entries(aerie::Pool*, const int64_t* starts, const int64_t* lens,
                        const int64_t* ends, const bool* samples, const int64_t* next_tokens,
                        const int64_t* path, const int64_t* accepted, const int64_t* emitted,
                        const int64_t* firsts, const int32_t* tables, int64_t B, int64_t E,
                        int64_t columns, int64_t block_size, int64_t* cu, int32_t* cu_q,
                        int32_t* prefix_lens, int64_t* last, int64_t* newest, int64_t* features,
                        int64_t* tokens, int64_t* positions, int64_t* slots) {
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
      slots[at] = int64_t{tables[position / block_size]} * block_size + position % block_size;
    }
    cu[b + 1] = at;
    cu_q[b + 1] = static_cast<int32_t>(at);
    prefix_lens[b] = count ? static_cast<int32_t>(starts[b] + 1) : 0;
    last[b] = std::max<int64_t>(at - 1, 0);
    newest[b] = count ? starts[b] + count : -1;
  }
}

}  // extern "C"
