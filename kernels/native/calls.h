// What the entry points for linear layers and for the passes between them take.
#pragma once

#include <cstdint>

#include "parallel_for.h"

enum WeightKind : int64_t { BF16_WEIGHT, INT8_WEIGHT, INT4_WEIGHT };

// Read by native_structs.py, field by field: the weight of a linear layer, padded with zeros to a multiple of 64
// outputs and of 32 inputs.
struct Weight {
    const void *values;
    const float *scales;   // of an int8 weight, by output; or null
    const uint16_t *bias;  // or null
    int64_t kind;          // a WeightKind
    int64_t num_slices;    // of its inputs, added up as slices.h says, each padded to a multiple of 32 inputs; 0 as 1
};

// Read by native_structs.py, field by field. Sizes in elements.
struct LinearCall {
    int64_t num_rows, num_inputs, num_outputs;
    const uint16_t *in;  // dense
    Weight weight;
    uint16_t *out;  // dense
    RunParallel run_parallel;
    int64_t num_threads;
    const uint16_t *residual;  // of out's shape, added to what was rounded; may be `out` itself; or null
    int64_t is_gated;          // 1: out is silu(first half of the outputs) * second half; see fuses_gate
    float *wide_out;           // of out's shape: outputs that are not rounded, instead of those in `out`; or null
    int64_t only_slice;        // 1 or more: the sums of that slice of the inputs alone; 0: all
};

// Read by native_structs.py, field by field.
struct Norm {
    const float *weight, *bias;  // bias: or null
    float epsilon;
    int32_t is_centred;  // 1: the mean is taken off before (LayerNorm)
};

// Read by native_structs.py, field by field.
struct Activation {
    int64_t kind;        // an ActivationKind
    int64_t has_gate;    // 1: of the first half of the inputs, times the second half
    float clamp;         // with a gate: the first half is cut off above, the second on both sides; 0: nowhere
    float gate_offset;   // added to the second half
};

// Read by native_structs.py, field by field. in and out are dense, fp32 or bf16.
struct PassCall {
    int64_t is_bf16;
    RunParallel run_parallel;
    int64_t num_threads, num_rows, width;
    const void *in;
    void *out;
    const Norm *norm;
    const Activation *activation;
};

// 0, or 1 when memory ran out; then the output cannot be used.
extern "C" int medha_linear(const LinearCall *call);
// What medha_linear makes of its sums: `sums` [rows][outputs], dense, become `out`.
extern "C" int medha_finish(const LinearCall *call, const float *sums);
// Several layers of the same kind of weight at once, on the threads of the first.
void multiply_all(const LinearCall *calls, int64_t count);
// Whether medha_linear has is_gated for so many outputs of either half.
bool fuses_gate(int64_t ffn_size);
// out [rows, width] = norm of in [rows, width].
extern "C" int medha_norm(const PassCall *call);
// out [rows, width] = activation of in [rows, width, or twice as many with a gate].
extern "C" int medha_activate(const PassCall *call);
