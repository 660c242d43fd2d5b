// The C functions that other kernels call. Each is defined beside its kernel, which describes it.
#pragma once

#include <cstdint>

#include "pool.h"

extern "C" {

void aerie_rms_norm(aerie::Pool* pool, const float* x, float* residual, const float* weight,
                    int64_t T, int64_t H, float eps, float* out);

void aerie_silu_and_mul(aerie::Pool* pool, const float* gate_up, int64_t T, int64_t F, float* out);

void aerie_linear_groups(aerie::Pool* pool, int64_t bits, int64_t group, int64_t wide,
                         int64_t minimums, const float* x, int64_t M, int64_t K,
                         const uint8_t* weight, int64_t N, const float* bias, float* out,
                         int64_t stride);

}  // extern "C"
