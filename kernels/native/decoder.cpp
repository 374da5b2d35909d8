// A whole step of a bf16 decoder in one call: embedding, layers, output layer. One rank of tensor parallelism.
//
// The same functions in the same order, with the same roundings to bf16 in between, as the layers called one by one
// from Python; what is saved is the way there and back, a hundred times a step, and waking threads for each.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "activation.h"
#include "calls.h"
#include "experts.h"
#include "layout.h"
#include "parallel_for.h"
#include "rows.h"
#include "spin_pool.h"
#include "storage.h"
#include "sums.h"

// Read by native_structs.py, field by field.
struct DenseMlp {
    Weight up, down;  // up: with a gate both halves; up.values null: there is no MLP
    int64_t ffn_size;
    Activation activation;
};

// Read by native_structs.py, field by field.
struct DecoderLayer {
    Norm attention_norm, mlp_norm;
    Norm q_norm, k_norm;  // of each head; weight null: there is none
    Weight qkv;           // outputs [kv heads][queries of it, key, value][head_dim]
    Weight proj;
    DenseMlp mlp;                 // or the expert that every token goes through
    const ExpertsLayer *experts;  // or null
    Weight shared_gate;           // values null: that expert's output is not weighted
    int64_t num_rotated;          // numbers at a head's beginning that turn; 0: none
    int64_t is_interleaved;       // 1: pairs that turn together are neighbours, and come apart
    void *k_pool, *v_pool;
};

// Read by native_structs.py, field by field.
struct DecoderCall {
    RunParallel run_parallel;  // null: threads of our own that stay awake for the length of the call
    int64_t num_threads;
    int64_t hidden_size, num_kv_heads, queries_per_kv_head, head_dim;
    float scale;
    const DecoderLayer *layers;
    int64_t num_layers, pool_head_stride;

    int64_t num_tokens;
    const int64_t *token_ids;   // with `embedding`; null: `hidden` comes from the stage before
    const uint16_t *embedding;  // [vocabulary][hidden]
    const uint16_t *position_embedding;  // [positions][hidden], added to it; or null
    const int64_t *positions;            // [T]; read for that only
    uint16_t *hidden;           // [T][hidden], in and out: what the last layer leaves
    const float *cos, *signed_sin;  // [angles][angle_width]
    int64_t angle_width;
    const int64_t *angle_rows;      // [T], of each token in these; null: its own
    const int64_t *slots;
    const Rows *rows;
    int64_t num_rows;

    int64_t num_logit_rows;  // 0: no output layer here
    const int64_t *logit_rows;
    Norm final_norm;
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
        static thread_local PerDepth<Buffer> memory;
        const int64_t num_tokens = call_.num_tokens, hidden = call_.hidden_size;
        int64_t up_size = 0, ffn_size = 0, most_experts = 0;
        for (int64_t i = 0; i < call_.num_layers; ++i) {
            const DenseMlp &mlp = call_.layers[i].mlp;
            ffn_size = std::max(ffn_size, mlp.ffn_size);
            up_size = std::max(up_size, mlp.ffn_size * (mlp.activation.has_gate ? 2 : 1));
            most_experts = std::max<int64_t>(most_experts, call_.layers[i].experts != nullptr);
        }
        const int64_t row = hidden * (1 + 2 * most_experts) + mixed_size_ + attended_size_ + up_size + ffn_size + 1;
        normed_ = memory.now().at_least<uint16_t>(std::max(num_tokens * row, call_.num_logit_rows * 2 * hidden));
        mixed_ = normed_ + num_tokens * hidden;
        attended_ = mixed_ + num_tokens * mixed_size_;
        up_ = attended_ + num_tokens * attended_size_;
        activated_ = up_ + num_tokens * up_size;
        added_up_ = activated_ + num_tokens * ffn_size;
        shared_ = added_up_ + num_tokens * hidden * most_experts;
        shared_weights_ = shared_ + num_tokens * hidden * most_experts;
        if (call_.token_ids != nullptr)
            for (int64_t t = 0; t < num_tokens; ++t) embed(t);
        for (int64_t i = 0; i < call_.num_layers; ++i) run_layer(call_.layers[i]);
        if (call_.num_logit_rows) put_out();
    }

  private:
    void embed(int64_t token) {
        const int64_t size = call_.hidden_size;
        copy_row(call_.embedding, call_.token_ids[token], call_.hidden, token);
        if (call_.position_embedding != nullptr)
            add_row(call_.hidden + token * size, call_.position_embedding + call_.positions[token] * size, size);
    }

    void run_layer(const DecoderLayer &layer) {
        const int64_t hidden = call_.hidden_size;
        norm(call_.hidden, call_.num_tokens, layer.attention_norm, normed_);
        multiply(normed_, call_.num_tokens, hidden, layer.qkv, mixed_, mixed_size_, nullptr);
        if (layer.num_rotated > 0 || layer.q_norm.weight != nullptr)
            each_token(mixed_size_, [&](int64_t token) {
                static thread_local Buffer memory;
                turn(layer, token, memory.at_least<float>(call_.head_dim + WIDTH));
            });
        attend(layer);
        multiply(attended_, call_.num_tokens, attended_size_, layer.proj, call_.hidden, hidden, call_.hidden);
        norm(call_.hidden, call_.num_tokens, layer.mlp_norm, normed_);
        layer.experts == nullptr ? run_mlp(layer.mlp, call_.hidden, call_.hidden) : run_experts(layer);
    }

    // num_numbers: that are read or written for a token.
    template <class Body>
    void each_token(int64_t num_numbers, const Body &body) const {
        const int64_t threads = useful_threads(
            run_parallel_, call_.num_threads, num_numbers * call_.num_tokens, MIN_PARALLEL_NUMBERS
        );
        parallel_for(run_parallel_, threads, call_.num_tokens, body);
    }

    void run_mlp(const DenseMlp &mlp, uint16_t *out, const uint16_t *residual) {
        const int64_t num_tokens = call_.num_tokens, hidden = call_.hidden_size, size = mlp.ffn_size;
        const int64_t up_size = mlp.activation.has_gate ? 2 * size : size;
        if (is_plain_swiglu(mlp.activation) && fuses_gate(size)) {
            multiply(normed_, num_tokens, hidden, mlp.up, activated_, up_size, nullptr, true);
        } else {
            multiply(normed_, num_tokens, hidden, mlp.up, up_, up_size, nullptr);
            const PassCall pass{
                1, run_parallel_, call_.num_threads, num_tokens, size, up_, activated_, nullptr, &mlp.activation
            };
            check(medha_activate(&pass));
        }
        multiply(activated_, num_tokens, size, mlp.down, out, hidden, residual);
    }

    void run_experts(const DecoderLayer &layer) {
        const int64_t hidden = call_.hidden_size;
        const bool has_shared = layer.mlp.up.values != nullptr, is_weighted = layer.shared_gate.values != nullptr;
        add_up_experts(
            {run_parallel_, call_.num_threads, call_.num_tokens, hidden, layer.experts, normed_, added_up_, nullptr}
        );
        if (has_shared) run_mlp(layer.mlp, shared_, nullptr);
        if (is_weighted) multiply(normed_, call_.num_tokens, hidden, layer.shared_gate, shared_weights_, 1, nullptr);
        each_token(hidden, [&](int64_t token) {
            uint16_t *const sum = added_up_ + token * hidden, *const shared = shared_ + token * hidden;
            if (is_weighted) weigh_row(shared, shared_weights_[token], hidden);
            if (has_shared) add_row(sum, shared, hidden);
            add_row(call_.hidden + token * hidden, sum, hidden);
        });
    }

    void put_out() {
        uint16_t *const chosen = normed_, *const normed = normed_ + call_.num_logit_rows * call_.hidden_size;
        for (int64_t r = 0; r < call_.num_logit_rows; ++r) copy_row(call_.hidden, call_.logit_rows[r], chosen, r);
        norm(chosen, call_.num_logit_rows, call_.final_norm, normed);
        multiply(
            normed, call_.num_logit_rows, call_.hidden_size, call_.output, call_.logits, call_.num_outputs, nullptr
        );
    }

    // Queries and keys of one token: normalised where the model does that, and turned by the token's angles.
    void turn(const DecoderLayer &layer, int64_t token, float *row) {
        const int64_t dim = call_.head_dim, num_rotated = layer.num_rotated, half = num_rotated / 2;
        const int64_t angles = (call_.angle_rows == nullptr ? token : call_.angle_rows[token]) * call_.angle_width;
        const float *const cos = call_.cos + angles, *const signed_sin = call_.signed_sin + angles;
        for (int64_t head = 0; head < call_.num_kv_heads; ++head)
            for (int64_t i = 0; i < group_ - 1; ++i) {
                uint16_t *const x = mixed_ + token * mixed_size_ + (head * group_ + i) * dim;
                const Norm &norm = i < group_ - 2 ? layer.q_norm : layer.k_norm;
                if (norm.weight != nullptr) norm_row(norm, x, dim, row, x);
                for (int64_t d = 0; d < num_rotated; ++d) row[d] = to_float(x[d]);
                for (int64_t d = 0; d < half; ++d) {
                    const float low = layer.is_interleaved ? row[2 * d] : row[d];
                    const float high = layer.is_interleaved ? row[2 * d + 1] : row[d + half];
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

    void norm(const uint16_t *in, int64_t num_rows, const Norm &norm, uint16_t *out) {
        const PassCall pass{
            1, run_parallel_, call_.num_threads, num_rows, call_.hidden_size, in, out, &norm, nullptr
        };
        check(medha_norm(&pass));
    }

    void multiply(
        const uint16_t *in, int64_t num_rows, int64_t num_inputs, const Weight &weight, uint16_t *out,
        int64_t num_outputs, const uint16_t *residual, bool is_gated = false
    ) {
        const LinearCall call{num_rows, num_inputs,    num_outputs,       in,       weight,   out,
                              run_parallel_, call_.num_threads, residual, is_gated, nullptr};
        check(medha_linear(&call));
    }

    static void add_row(uint16_t *to, const uint16_t *more, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH)
            store_first(to + i, load_first(to + i, size - i) + load_first(more + i, size - i), size - i);
    }

    // row times the sigmoid of its gate, which is rounded before.
    static void weigh_row(uint16_t *row, uint16_t gate, int64_t size) {
        const Vec weight = rounded(times_sigmoid(splat(1.0f), splat(to_float(gate))));
        for (int64_t i = 0; i < size; i += WIDTH)
            store_first(row + i, load_first(row + i, size - i) * weight, size - i);
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
    uint16_t *normed_ = nullptr, *mixed_ = nullptr, *attended_ = nullptr, *up_ = nullptr, *activated_ = nullptr;
    uint16_t *added_up_ = nullptr, *shared_ = nullptr, *shared_weights_ = nullptr;
};

}  // namespace

// 0, or 1 when memory ran out; then nothing of the output can be used, and `hidden` is lost.
extern "C" int medha_decoder(const DecoderCall *call) {
    return is_out_of_memory([&] {
        const PoolScope pool(call->run_parallel == nullptr ? call->num_threads : 1);
        Decoder(*call, call->run_parallel == nullptr ? pool.runner() : call->run_parallel).run();
    });
}
