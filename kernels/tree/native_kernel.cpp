// Draft trees, see reference.py.

#include <cstdint>

#include "../native/pool.h"

extern "C" {

// tokens, parents, drawn [B, N] -> path and emitted [B, max_depth + 1], accepted [B]. Trees are so
// small that one thread walks them all.
void aerie_tree_walk(aerie::Pool*, const int64_t* tokens, const int64_t* parents,
                     const int64_t* drawn, int64_t B, int64_t N, int64_t max_depth, int64_t* path,
                     int64_t* accepted, int64_t* emitted) {
  for (int64_t b = 0; b < B; ++b, tokens += N, parents += N, drawn += N) {
    int64_t node = 0, depth = 0;
    for (;; ++depth) {
      *path++ = node;
      *emitted++ = drawn[node];
      if (depth == max_depth) break;
      int64_t child = 0;
      while (child < N && !(parents[child] == node && tokens[child] == drawn[node])) ++child;
      if (child == N) break;
      node = child;
    }
    *accepted++ = depth;
    for (; depth < max_depth; ++depth) {
      *path++ = -1;
      *emitted++ = -1;
    }
  }
}

}  // extern "C"
