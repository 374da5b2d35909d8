// A whole step of a dense bf16 decoder in one call: embedding, layers, output layer. One rank of tensor parallelism.
//
// The same functions in the same order, with the same roundings to bf16 in between, as the layers called one by one
// from Python; what is saved is the way there and back, a hundred times a step, and waking threads for each.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "calls.h"
#include "layout.h"
#include "parallel_for.h"
#include "rows.h"
#include "spin_pool.h"
#include "storage.h"
#include "sums.h"

// Read by native_structs.py, field by field; as in LinearCall.
struct Weight {
    const void *values;
    const float *scales;
};

// Read by native_structs.py, field by field.
struct DecoderLayer {
    const uint16_t *attention_norm, *mlp_norm;  // [hidden]
    const uint16_t *q_norm, *k_norm;            // [head_dim], or null
    const uint16_t *qkv_bias;                   // or null
    Weight qkv;                                 // outputs [kv heads][queries of it, key, value][head_dim]
    Weight proj, gate_and_up, down;
    void *k_pool, *v_pool;
};

// Read by native_structs.py, field by field.
struct DecoderCall {
    RunParallel run_parallel;  // null: threads of our own that stay awake for the length of the call
    int64_t num_threads;
    int64_t hidden_size, num_kv_heads, queries_per_kv_head, head_dim, ffn_size;
    float epsilon, scale;
    const DecoderLayer *layers;
    int64_t num_layers, pool_head_stride;

    int64_t num_tokens;
    const int64_t *token_ids;   // with `embedding`; null: `hidden` comes from the stage before
    const uint16_t *embedding;  // [vocabulary][hidden]
    uint16_t *hidden;           // [T][hidden], in and out: what the last layer leaves
    const float *cos, *signed_sin;  // [angles][head_dim]
    const int64_t *angle_rows;      // [T], of each token in these; null: its own
    const int64_t *slots;
    const Rows *rows;
    int64_t num_rows;

    int64_t num_logit_rows;  // 0: no output layer here
    const int64_t *logit_rows;
    const uint16_t *final_norm;
    Weight output;
    int64_t num_outputs;
    uint16_t *logits;  // [logit rows][outputs]
};

namespace {

// Numbers below which a second thread that must be woken costs more than it saves.
constexpr int64_t MIN_PARALLEL_NUMBERS = 1 << 16;

class Decoder {
  public:
    Decoder(const DecoderCall &call, RunParallel run_parallel)
        : call_(call),
          run_parallel_(run_parallel),
          num_heads_(call.num_kv_heads * call.queries_per_kv_head),
          group_(call.queries_per_kv_head + 2),
          mixed_size_(call.num_kv_heads * group_ * call.head_dim),
          attended_size_(num_heads_ * call.head_dim) {}

    void run() {
        static thread_local Buffer memory;
        const int64_t num_tokens = call_.num_tokens, row = call_.hidden_size + mixed_size_ + attended_size_ +
                                                           3 * call_.ffn_size;
        normed_ = memory.at_least<uint16_t>(std::max(num_tokens * row, call_.num_logit_rows * 2 * call_.hidden_size));
        mixed_ = normed_ + num_tokens * call_.hidden_size;
        attended_ = mixed_ + num_tokens * mixed_size_;
        gate_and_up_ = attended_ + num_tokens * attended_size_;
        activated_ = gate_and_up_ + num_tokens * 2 * call_.ffn_size;
        if (call_.token_ids != nullptr)
            for (int64_t t = 0; t < num_tokens; ++t) copy_row(call_.embedding, call_.token_ids[t], call_.hidden, t);
        for (int64_t i = 0; i < call_.num_layers; ++i) run_layer(call_.layers[i]);
        if (call_.num_logit_rows) put_out();
    }

  private:
    void run_layer(const DecoderLayer &layer) {
        const int64_t hidden = call_.hidden_size;
        norm(call_.hidden, call_.num_tokens, layer.attention_norm, normed_);
        multiply(normed_, call_.num_tokens, hidden, layer.qkv, layer.qkv_bias, mixed_, mixed_size_, nullptr);
        const int64_t threads = useful_threads(
            run_parallel_, call_.num_threads, mixed_size_ * call_.num_tokens, MIN_PARALLEL_NUMBERS
        );
        parallel_for(run_parallel_, threads, call_.num_tokens, [&](int64_t token) {
            static thread_local Buffer memory;
            rotate(layer, token, memory.at_least<float>(call_.head_dim + WIDTH));
        });
        attend(layer);
        multiply(
            attended_, call_.num_tokens, attended_size_, layer.proj, nullptr, call_.hidden, hidden, call_.hidden
        );
        norm(call_.hidden, call_.num_tokens, layer.mlp_norm, normed_);
        activate(layer);
        multiply(
            activated_, call_.num_tokens, call_.ffn_size, layer.down, nullptr, call_.hidden, hidden, call_.hidden
        );
    }

    // silu(gate) * up of the MLP.
    void activate(const DecoderLayer &layer) {
        const int64_t num_tokens = call_.num_tokens, hidden = call_.hidden_size, size = call_.ffn_size;
        if (fuses_gate(size)) {
            multiply(normed_, num_tokens, hidden, layer.gate_and_up, nullptr, activated_, 2 * size, nullptr, true);
            return;
        }
        multiply(normed_, num_tokens, hidden, layer.gate_and_up, nullptr, gate_and_up_, 2 * size, nullptr);
        const PassCall pass{1,       run_parallel_, call_.num_threads, num_tokens, size, gate_and_up_,
                            nullptr, activated_,    0.0f};
        check(medha_gated_silu(&pass));
    }

    void put_out() {
        uint16_t *const chosen = normed_, *const normed = normed_ + call_.num_logit_rows * call_.hidden_size;
        for (int64_t r = 0; r < call_.num_logit_rows; ++r) copy_row(call_.hidden, call_.logit_rows[r], chosen, r);
        norm(chosen, call_.num_logit_rows, call_.final_norm, normed);
        multiply(
            normed, call_.num_logit_rows, call_.hidden_size, call_.output, nullptr, call_.logits, call_.num_outputs,
            nullptr
        );
    }

    // Queries and keys of one token: normalised where the model does that, and turned by the token's angles.
    void rotate(const DecoderLayer &layer, int64_t token, float *row) {
        const int64_t dim = call_.head_dim, half = dim / 2;
        const int64_t angles = (call_.angle_rows == nullptr ? token : call_.angle_rows[token]) * dim;
        const float *const cos = call_.cos + angles, *const signed_sin = call_.signed_sin + angles;
        for (int64_t head = 0; head < call_.num_kv_heads; ++head)
            for (int64_t i = 0; i < group_ - 1; ++i) {
                uint16_t *const x = mixed_ + token * mixed_size_ + (head * group_ + i) * dim;
                const uint16_t *const weight = i < group_ - 2 ? layer.q_norm : layer.k_norm;
                if (weight != nullptr) rms_norm_row(x, weight, call_.epsilon, dim, row, x);
                for (int64_t d = 0; d < dim; ++d) row[d] = to_float(x[d]);
                for (int64_t d = 0; d < half; ++d) {
                    const float low = row[d], high = row[d + half];
                    // Rounded as torch does it: the compiler might fuse the other product.
                    from_float(std::fma(low, cos[d], high * signed_sin[d]), x + d);
                    from_float(std::fma(high, cos[d + half], low * signed_sin[d + half]), x + d + half);
                }
            }
    }

    void attend(const DecoderLayer &layer) {
        const int64_t dim = call_.head_dim;
        Call call{};
        call.is_bf16 = 1;
        call.num_tokens = call_.num_tokens;
        call.num_kv_heads = call_.num_kv_heads;
        call.queries_per_kv_head = call_.queries_per_kv_head;
        call.head_dim = dim;
        call.scale = call_.scale;
        call.num_threads = static_cast<int32_t>(call_.num_threads);
        call.run_parallel = run_parallel_;
        call.k_pool = layer.k_pool;
        call.v_pool = layer.v_pool;
        call.pool_head_stride = call_.pool_head_stride;
        call.q = mixed_;
        call.k = mixed_ + (group_ - 2) * dim;
        call.v = mixed_ + (group_ - 1) * dim;
        call.q_token_stride = call.k_token_stride = call.v_token_stride = mixed_size_;
        call.q_head_stride = call.k_head_stride = call.v_head_stride = group_ * dim;
        call.q_group_stride = dim;
        call.slots = call_.slots;
        call.out = attended_;
        call.rows = call_.rows;
        call.num_rows = call_.num_rows;
        check(medha_attend(&call));
    }

    void norm(const uint16_t *in, int64_t num_rows, const uint16_t *weight, uint16_t *out) {
        const PassCall pass{1,  run_parallel_,  call_.num_threads, num_rows, call_.hidden_size, in, weight, out, call_.epsilon};
        check(medha_rms_norm(&pass));
    }

    void multiply(
        const uint16_t *in, int64_t num_rows, int64_t num_inputs, const Weight &weight, const uint16_t *bias,
        uint16_t *out, int64_t num_outputs, const uint16_t *residual, bool is_gated = false
    ) {
        const LinearCall call{num_rows, num_inputs, num_outputs, in,    weight.values,     weight.scales,
                              bias,     out,        run_parallel_,       call_.num_threads, residual,          is_gated};
        check(medha_linear(&call));
    }

    void copy_row(const uint16_t *from, int64_t from_row, uint16_t *to, int64_t to_row) const {
        const int64_t size = call_.hidden_size;
        std::memcpy(to + to_row * size, from + from_row * size, size * sizeof(uint16_t));
    }

    static void check(int failed) {
        if (failed) throw std::bad_alloc();
    }

    const DecoderCall &call_;
    const RunParallel run_parallel_;
    const int64_t num_heads_, group_, mixed_size_, attended_size_;
    uint16_t *normed_ = nullptr, *mixed_ = nullptr, *attended_ = nullptr, *gate_and_up_ = nullptr,
             *activated_ = nullptr;
};

}  // namespace

// 0, or 1 when memory ran out; then nothing of the output can be used, and `hidden` is lost.
extern "C" int medha_decoder(const DecoderCall *call) {
    return is_out_of_memory([&] {
        const PoolScope pool(call->run_parallel == nullptr ? call->num_threads : 1);
        Decoder(*call, call->run_parallel == nullptr ? pool.runner() : call->run_parallel).run();
    });
}
