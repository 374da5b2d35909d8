// What the entry points for linear layers and for the passes between them take.
#pragma once

#include <cstdint>

#include "parallel_for.h"

// Read by native_structs.py, field by field. Sizes in elements; the weight is padded with zeros to
// a multiple of 64 outputs and of 32 inputs.
struct LinearCall {
    int64_t num_rows, num_inputs, num_outputs;
    const uint16_t *in;  // dense
    const void *weight;
    const float *scales;   // of an int8 weight, by output; null: the weight is bf16
    const uint16_t *bias;  // or null
    uint16_t *out;         // dense
    RunParallel run_parallel;
    int64_t num_threads;
    const uint16_t *residual;  // of out's shape, added to what was rounded; may be `out` itself; or null
    int64_t is_gated;          // 1: out is silu(first half of the outputs) * second half; see fuses_gate
};

// Read by native_structs.py, field by field. in and out are dense, fp32 or bf16.
struct PassCall {
    int64_t is_bf16;
    RunParallel run_parallel;
    int64_t num_threads, num_rows, width;
    const void *in, *weight;
    void *out;
    float epsilon;
};

// 0, or 1 when memory ran out; then the output cannot be used.
extern "C" int medha_linear(const LinearCall *call);
// Whether medha_linear has is_gated for so many outputs of either half.
bool fuses_gate(int64_t ffn_size);
// out [rows, width] = in [rows, width] / sqrt(mean of squares + epsilon) * weight [width].
extern "C" int medha_rms_norm(const PassCall *call);
// out [rows, width] = silu(in [rows, :width]) * in [rows, width:2 width].
extern "C" int medha_gated_silu(const PassCall *call);
