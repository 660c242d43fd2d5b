// The C functions that other kernels call. Each is defined beside its kernel, which describes it.
#pragma once

#include <cstdint>

#include "pool.h"

extern "C" {

void aerie_rms_norm(aerie::Pool* pool, const float* x, float* residual, const float* weight,
                    int64_t T, int64_t H, float eps, float* out);

void aerie_silu_and_mul(aerie::Pool* pool, const float* gate_up, int64_t T, int64_t F, float* out);

}  // extern "C"
