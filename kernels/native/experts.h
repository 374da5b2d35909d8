// A layer of routed experts: how its router chooses, and what is computed of it in one call.
#pragma once

#include <cstdint>

#include "calls.h"
#include "parallel_for.h"

// Read by native_structs.py, field by field.
struct Expert {
    Weight up, down;  // up: with a gate both halves; up.values null: the expert is on another rank
};

// Read by native_structs.py, field by field.
struct Router {
    Weight weight;             // bf16
    const float *choice_bias;  // added to the scores when experts are chosen, or null
    int64_t num_experts, num_chosen;
    int64_t num_groups, num_chosen_groups;  // 0: experts come in no groups
    int64_t is_sigmoid;                     // 1: scores are sigmoids of the router's outputs; 0: a softmax
    int64_t is_scored_first;                // softmax: 1 over all experts, 0 over those chosen
    int64_t is_wide;                        // 1: outputs and scores are fp32; 0: each is rounded to bf16
    float weight_scale;                     // what the weights of the chosen are multiplied by, or 0
    int32_t adds_biases;                    // 0: another rank adds those of the experts' outputs
};

// Read by native_structs.py, field by field.
struct ExpertsLayer {
    Router router;
    const Expert *experts;
    int64_t ffn_size;
    Activation activation;
};

// Read by native_structs.py, field by field.
struct ExpertsCall {
    RunParallel run_parallel;
    int64_t num_threads, num_tokens, hidden_size;
    const ExpertsLayer *layer;
    const uint16_t *in;  // [T][hidden]
    uint16_t *out;       // likewise: the weighted sum of each token's experts
    float *wide_out;     // the same as fp32, instead of `out`, for other ranks' to be added to; or null
};

// The first num_chosen experts of a token's scores, in ascending order, and their weights. memory: for twice as many
// floats as there are experts. Needs flush-to-zero.
void choose_experts(const Router &router, const float *outputs, float *memory, int32_t *chosen, float *weights);

// Where second layers have slices (slices.h), a token's experts are added up slice by slice, then the slices: ranks that
// have some slices each do the same additions. Throws std::bad_alloc.
void add_up_experts(const ExpertsCall &call);
extern "C" int medha_experts(const ExpertsCall *call);
