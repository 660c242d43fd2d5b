// Moves inside the paged cache.

#include <cstdint>
#include <cstring>

#include "../native/pool.h"

// pages: addresses of keys and values of all layers; sources, targets [M].
extern "C" void aerie_kv_move(aerie::Pool* pool, char* const* pages, int64_t num_pages,
                              int64_t slot_bytes, const int64_t* sources, const int64_t* targets,
                              int64_t M) {
  pool->run(num_pages, [&](int64_t page) {
    for (int64_t m = 0; m < M; ++m)
      if (sources[m] != targets[m])
        std::memcpy(pages[page] + targets[m] * slot_bytes, pages[page] + sources[m] * slot_bytes,
                    slot_bytes);
  });
}
