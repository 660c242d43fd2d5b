// Decoder layers: the operations of engine/models/layers.py one after the other, in one call.
//
// At batch 1 a layer takes about 100 us, and as much again to call its ten operations from Python.
// Every number is that of the separate operations.

#include <algorithm>

#include "../native/functions.h"

namespace {

using aerie::Pool;

// A packed linear weight (kernels/ops.py, LinearWeight). `bits` is 0 for plain numbers.
struct Linear {
  const void* data;
  const float* bias;
  int64_t outputs, bits, group, wide, minimums;
  const Linear* more;  // writes the columns after those of this one
};

// Functions for the storage dtype and this CPU; plain and cache pointers have that dtype.
struct Functions {
  void (*linear)(Pool*, const float* x, int64_t M, int64_t K, const void* weight, int64_t N,
                 const float* bias, float* out);
  void (*linear_groups)(Pool*, int64_t bits, int64_t group, int64_t wide, int64_t minimums,
                        const float* x, int64_t M, int64_t K, const void* weight, int64_t N,
                        const float* bias, float* out, int64_t stride);
  void (*rope_kv_write)(Pool*, const float* qkv, int64_t T, int64_t num_heads, int64_t num_kv_heads,
                        int64_t D, const float* cos_sin, const int64_t* positions,
                        const int64_t* slots, void* keys, void* values, float key_inverse,
                        float value_inverse, float* queries);
  void (*attention)(Pool*, const float* queries, const void* keys, const void* values,
                    const int32_t* cu_q, const int32_t* prefix_lens, const int32_t* first_keys,
                    int64_t num_rows, const int32_t* block_tables, const int64_t* ancestors,
                    int64_t max_blocks, int64_t block_size, int64_t num_heads,
                    int64_t num_kv_heads, int64_t D, float scale, float value_scale, float* out);
};

struct Layer {
  Functions functions;
  const float* input_norm;  // null: the input is normalised already
  const float* post_norm;
  Linear qkv, output, gate_up, down;
  const float* cos_sin;
  int64_t input_size, hidden_size, inner_size, num_heads, num_kv_heads, head_dim;
  float eps, scale;
  float key_inverse, value_inverse, value_scale;  // of the cache
};

struct Batch {
  int64_t num_tokens, num_rows, max_blocks, block_size;
  const int64_t *positions, *slots, *ancestors;
  const int32_t *cu_q, *prefix_lens, *first_keys, *block_tables;
};

enum Scratch { kNormed = 8, kQkv, kQueries, kMixed, kGateUp, kInner };

int64_t all_outputs(const Linear& linear) {
  return linear.outputs + (linear.more ? all_outputs(*linear.more) : 0);
}

void multiply(Pool* pool, const Layer& layer, const Linear& linear, const float* x, int64_t M,
              int64_t K, float* out) {
  if (!linear.bits)
    return layer.functions.linear(pool, x, M, K, linear.data, linear.outputs, linear.bias, out);
  const int64_t stride = all_outputs(linear);
  for (const Linear* part = &linear; part; out += part->outputs, part = part->more)
    layer.functions.linear_groups(pool, part->bits, part->group, part->wide, part->minimums, x, M, K,
                                  part->data, part->outputs, part->bias, out, stride);
}

// The result is in scratch memory, [T, heads * D].
const float* attend(Pool* pool, const Layer& layer, const Batch& b, const float* x, void* keys,
                    void* values) {
  const int64_t T = b.num_tokens, heads = layer.num_heads, D = layer.head_dim;
  float* qkv = pool->scratch<float>(kQkv, T * (heads + 2 * layer.num_kv_heads) * D);
  float* queries = pool->scratch<float>(kQueries, T * heads * D);
  float* mixed = pool->scratch<float>(kMixed, T * heads * D);
  multiply(pool, layer, layer.qkv, x, T, layer.input_size, qkv);
  layer.functions.rope_kv_write(pool, qkv, T, heads, layer.num_kv_heads, D, layer.cos_sin,
                                b.positions, b.slots, keys, values, layer.key_inverse,
                                layer.value_inverse, queries);
  layer.functions.attention(pool, queries, keys, values, b.cu_q, b.prefix_lens, b.first_keys,
                            b.num_rows, b.block_tables, b.ancestors, b.max_blocks, b.block_size,
                            heads, layer.num_kv_heads, D, layer.scale, layer.value_scale, mixed);
  return mixed;
}

// out = a + b, [T, H]; a few rows are not worth other threads.
void add(Pool* pool, const float* a, const float* b, int64_t T, int64_t H, float* out) {
  constexpr int64_t kRows = 64;
  pool->run((T + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t end = std::min(T, (task + 1) * kRows) * H;
    for (int64_t i = task * kRows * H; i < end; ++i) out[i] = a[i] + b[i];
  });
}

// x and out may be the same.
void run_layer(Pool* pool, const Layer& layer, const Batch& batch, const float* x, float* residual,
               void* keys, void* values, float* out) {
  const int64_t T = batch.num_tokens, H = layer.hidden_size, F = layer.inner_size;
  if (layer.input_norm) {
    float* normed = pool->scratch<float>(kNormed, T * H);
    aerie_rms_norm(pool, x, residual, layer.input_norm, T, H, layer.eps, normed);
    x = normed;
  }
  const float* mixed = attend(pool, layer, batch, x, keys, values);
  multiply(pool, layer, layer.output, mixed, T, layer.num_heads * layer.head_dim, out);
  float* normed = pool->scratch<float>(kNormed, T * H);
  aerie_rms_norm(pool, out, residual, layer.post_norm, T, H, layer.eps, normed);
  float* gate_up = pool->scratch<float>(kGateUp, T * 2 * F);
  float* inner = pool->scratch<float>(kInner, T * F);
  multiply(pool, layer, layer.gate_up, normed, T, H, gate_up);
  aerie_silu_and_mul(pool, gate_up, T, F, inner);
  multiply(pool, layer, layer.down, inner, T, F, out);
}

}  // namespace

extern "C" {

// Of each of `count` layers, `keys` and `values` have the pages, and `taps` has null or [T, H], which
// takes the stream that enters the layer. x is [T, input_size] if the first
// layer has no input norm, else [T, H], as is out. The residual stream [T, H] takes the input of
// every layer (with an input norm) and the output of its attention.
void aerie_decoder_layers(Pool* pool, const Layer* const* layers, int64_t count, const Batch* batch,
                          const float* x, float* residual, void* const* keys, void* const* values,
                          float* const* taps, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (taps[i]) add(pool, x, residual, batch->num_tokens, layers[i]->hidden_size, taps[i]);
    run_layer(pool, *layers[i], *batch, x, residual, keys[i], values[i], out);
    x = out;
  }
}

}  // extern "C"
