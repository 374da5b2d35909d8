// How keys and values lie in the pool, and the call every entry point takes.
//
// A pool is a row of groups of 16 slots (one slot is one token) for each kv head; a group of one head is contiguous,
// 16 * D numbers, D being the head dim rounded up to 16. Inside a group:
//   keys   fp32 [D][16]          bf16 [D/2][16][2]     a vector holds one dimension of consecutive tokens
//   values fp32 [16][D]          bf16 [8][D][2]        a vector holds consecutive dimensions of one token
// So both products of attention are rank-one updates of register tiles, with nothing to transpose when KV is read.
// The bf16 pairs are those of a bf16 dot product; without one, either half widens to fp32 in one instruction.
#pragma once

#include <cstdint>

#include "parallel_for.h"

constexpr int64_t GROUP = 16;

// Read by native_structs.py, field by field. Strides are in elements.
struct Call {
    int64_t is_bf16;
    int64_t num_tokens, num_kv_heads, queries_per_kv_head, head_dim;
    float scale;
    int32_t num_threads;
    RunParallel run_parallel;

    void *k_pool, *v_pool;
    int64_t pool_head_stride;

    const void *q, *k, *v;  // of the batch: [T, K, G, D], [T, K, D], [T, K, D], the last dimension dense
    int64_t q_token_stride, q_head_stride, q_group_stride;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    const int64_t *slots;  // where each token's own keys and values go, -1: nowhere; null: nothing is written

    void *out;   // [T, K, G, D], dense
    float *lse;  // [T, K, G], or null
    float *nodes;  // of rows that have nodes, instead of both: see Rows; else null
    const float *sinks;  // [K, G], a score beside those of the keys, which brings no value; or null

    const struct Rows *rows;
    int64_t num_rows;
};

inline int64_t num_heads(const Call &call) { return call.num_kv_heads * call.queries_per_kv_head; }
// Of a node's result for one token: of each head its values, their maximum and the total of their weights.
inline int64_t node_size(const Call &call) { return num_heads(call) * (call.head_dim + 2); }

// Consecutive rows (tokens) of the batch that belong to one sequence, and the keys they see.
struct Rows {
    int64_t first_token, num_tokens;
    int64_t num_keys;   // that the first token sees
    int64_t is_causal;  // 1: each further token sees one key more; 0: all see the same
    const struct Run *runs;  // in the order of the keys
    int64_t num_runs;
    int64_t first_position;    // of the first key in its sequence
    int64_t partition_tokens;  // of the partitions that attention is summed by: merge_tree.h

    // Of keys that are a shard of their sequence: what is given is not the output but the results of nodes of the merge
    // tree, for each row those from these partitions on, [rows][nodes][node_size]; none: the output.
    const int64_t *node_starts;
    int64_t num_nodes;
    int64_t first_result;  // of the first row in Call::nodes, in results of one row and node

    int64_t partition_of(int64_t key) const { return (first_position + key) / partition_tokens; }
    int64_t first_key_of(int64_t partition) const { return partition * partition_tokens - first_position; }
};

// Keys that lie next to one another: from first_key on, up to the next run's first.
struct Run {
    int64_t first_key, first_slot;
};

// 0, or 1 when memory ran out; then nothing of the output can be used.
extern "C" int medha_attend(const Call *call);
