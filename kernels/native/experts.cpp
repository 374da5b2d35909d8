// Routed experts of a batch: each expert's weights are read once, for all tokens that were sent to it.
//
// All experts' first layers are one job of the threads, all second ones another. An expert's output for a token does
// not depend on which others came with it, and a token's experts are added up by their number, so neither does the sum.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "activation.h"
#include "calls.h"
#include "experts.h"
#include "parallel_for.h"
#include "rows.h"
#include "simd.h"
#include "slices.h"
#include "spin_pool.h"
#include "storage.h"
#include "sums.h"

namespace {

constexpr int64_t MIN_PARALLEL_NUMBERS = 1 << 17;  // as in pointwise.cpp
constexpr int64_t ROWS_OF_ITEM = 8;
constexpr int64_t TOKENS_OF_ITEM = 4;

class Experts {
  public:
    explicit Experts(const ExpertsCall &call)
        : call_(call),
          router_(call.layer->router),
          activation_(call.layer->activation),
          num_rows_(call.num_tokens * router_.num_chosen),
          ffn_size_(call.layer->ffn_size),
          is_gate_fused_(is_plain_swiglu(activation_) && fuses_gate(ffn_size_)) {
        for (int64_t e = 0; e < router_.num_experts; ++e)
            num_slices_ = std::max(num_slices_, call.layer->experts[e].down.num_slices);
    }

    // A row is one token at one of its experts; rows of an expert lie together, in the order of their tokens.
    void run() {
        static thread_local PerDepth<Buffer> row_memory, float_memory, place_memory;
        const int64_t hidden = call_.hidden_size, up_size = activation_.has_gate ? 2 * ffn_size_ : ffn_size_;
        in_ = row_memory.now().at_least<uint16_t>(num_rows_ * (hidden + ffn_size_ + (is_gate_fused_ ? 0 : up_size)));
        activated_ = in_ + num_rows_ * hidden;
        up_ = is_gate_fused_ ? nullptr : activated_ + num_rows_ * ffn_size_;
        weights_ = float_memory.now().at_least<float>(num_rows_ + call_.num_tokens * router_.num_experts);
        chosen_ = place_memory.now().at_least<int32_t>(3 * num_rows_);
        row_of_ = chosen_ + num_rows_;
        source_of_ = row_of_ + num_rows_;
        route();
        sort_rows();
        gather();
        multiply(true, up_size, is_gate_fused_ ? activated_ : up_);
        activate();
        if (num_slices_ > 1 || call_.wide_out != nullptr) {
            add_up_in_slices();
        } else {
            multiply(false, hidden, in_);  // the inputs are not needed any more
            add_up();
        }
    }

  private:
    int64_t threads_for(int64_t num_numbers) const {
        return useful_threads(call_.run_parallel, call_.num_threads, num_numbers, MIN_PARALLEL_NUMBERS);
    }

    template <class Body>
    void each(int64_t count, int64_t of_item, int64_t num_numbers, const Body &body) const {
        parallel_for(call_.run_parallel, threads_for(num_numbers), (count + of_item - 1) / of_item, [&](int64_t item) {
            const int64_t end = std::min((item + 1) * of_item, count);
            for (int64_t i = item * of_item; i < end; ++i) body(i);
        });
    }

    void route() {
        const int64_t size = router_.num_experts, count = router_.num_chosen;
        float *const outputs = weights_ + num_rows_;
        LinearCall linear{};
        linear.num_rows = call_.num_tokens;
        linear.num_inputs = call_.hidden_size;
        linear.num_outputs = size;
        linear.in = call_.in;
        linear.weight = router_.weight;
        linear.run_parallel = call_.run_parallel;
        linear.num_threads = call_.num_threads;
        linear.wide_out = outputs;
        multiply_all(&linear, 1);
        each(call_.num_tokens, TOKENS_OF_ITEM, 8 * call_.num_tokens * size, [&](int64_t t) {
            static thread_local Buffer memory;
            float *const of_token = outputs + t * size;
            if (!router_.is_wide)
                for (int64_t e = 0; e < size; ++e) {
                    uint16_t rounded;
                    from_float(of_token[e], &rounded);
                    of_token[e] = to_float(rounded);
                }
            choose_experts(router_, of_token, memory.at_least<float>(2 * size), chosen_ + t * count, weights_ + t * count);
        });
    }

    void sort_rows() {
        first_row_of_.assign(router_.num_experts + 1, 0);
        for (int64_t i = 0; i < num_rows_; ++i) ++first_row_of_[chosen_[i] + 1];
        for (int64_t e = 0; e < router_.num_experts; ++e) first_row_of_[e + 1] += first_row_of_[e];
        std::vector<int64_t> next(first_row_of_.begin(), first_row_of_.end() - 1);
        for (int64_t i = 0; i < num_rows_; ++i) {
            row_of_[i] = static_cast<int32_t>(next[chosen_[i]]++);
            source_of_[row_of_[i]] = static_cast<int32_t>(i);
        }
    }

    void gather() const {
        const int64_t size = call_.hidden_size;
        each(num_rows_, ROWS_OF_ITEM, num_rows_ * size, [&](int64_t row) {
            std::copy_n(call_.in + source_of_[row] / router_.num_chosen * size, size, in_ + row * size);
        });
    }

    // only_slice: 1 or more, of the second layers, whose outputs go to `wide_out` then.
    void multiply(bool is_up, int64_t num_outputs, uint16_t *out, int64_t only_slice = 0, float *wide_out = nullptr) {
        linears_.clear();
        for (int64_t e = 0; e < router_.num_experts; ++e) {
            const Expert &expert = call_.layer->experts[e];
            const int64_t first = first_row_of_[e], num_rows = first_row_of_[e + 1] - first;
            if (num_rows == 0 || expert.up.values == nullptr) continue;
            const bool is_gated = is_up && is_gate_fused_;
            const int64_t num_inputs = is_up ? call_.hidden_size : ffn_size_;
            LinearCall linear{};
            linear.num_rows = num_rows;
            linear.num_inputs = num_inputs;
            linear.num_outputs = num_outputs;
            linear.in = (is_up ? in_ : activated_) + first * num_inputs;
            linear.weight = is_up ? expert.up : expert.down;
            if (!is_up) linear.weight.bias = nullptr;  // it is weighted: add_up
            if (wide_out != nullptr)
                linear.wide_out = wide_out + first * num_outputs;
            else
                linear.out = out + first * (is_gated ? ffn_size_ : num_outputs);
            linear.only_slice = only_slice;
            linear.run_parallel = call_.run_parallel;
            linear.num_threads = call_.num_threads;
            linear.is_gated = is_gated;
            linears_.push_back(linear);
        }
        multiply_all(linears_.data(), static_cast<int64_t>(linears_.size()));
    }

    // The activation, times the weight of the expert.
    void activate() const {
        const int64_t size = ffn_size_, up_size = activation_.has_gate ? 2 * size : size;
        each(num_rows_, ROWS_OF_ITEM, num_rows_ * size, [&](int64_t row) {
            uint16_t *const out = activated_ + row * size;
            if (!is_gate_fused_) activate_row(activation_, up_ + row * up_size, size, out);
            const Vec weight = splat(weights_[source_of_[row]]);
            for (int64_t i = 0; i < size; i += WIDTH)
                store_first(out + i, load_first(out + i, size - i) * weight, size - i);
        });
    }

    void add_up() const {
        const int64_t size = call_.hidden_size, count = router_.num_chosen;
        each(call_.num_tokens, TOKENS_OF_ITEM, num_rows_ * size, [&](int64_t t) {
            for (int64_t i = 0; i < size; i += WIDTH) {
                Vec sum = splat(0.0f);
                for (int64_t k = t * count; k < (t + 1) * count; ++k) {
                    const Expert &expert = call_.layer->experts[chosen_[k]];
                    if (expert.up.values == nullptr) continue;
                    Vec output = load_first(in_ + row_of_[k] * size + i, size - i);
                    if (expert.down.bias != nullptr && router_.adds_biases)
                        output = rounded(output + rounded(load_first(expert.down.bias + i, size - i) * splat(weights_[k])));
                    sum = sum + output;
                }
                store_first(call_.out + t * size + i, sum, size - i);
            }
        });
    }

    void add_up_in_slices() {
        static thread_local PerDepth<Buffer> memory;
        const int64_t hidden = call_.hidden_size, size = (call_.num_tokens * hidden + WIDTH - 1) / WIDTH * WIDTH;
        float *const nodes = memory.now().at_least<float>((1 + MAX_TREE_DEPTH) * size + num_rows_ * hidden);
        float *const outputs = nodes + (1 + MAX_TREE_DEPTH) * size;
        float *const sums = call_.wide_out != nullptr ? call_.wide_out : nodes + MAX_TREE_DEPTH * size;
        const auto each_row = [&](const auto &body) { each(call_.num_tokens, TOKENS_OF_ITEM, num_rows_ * hidden, body); };
        add_up_slices(
            0, std::max<int64_t>(1, num_slices_), sums, size, nodes,
            [&](int64_t slice, float *to) {
                multiply(false, hidden, nullptr, slice + 1, outputs);
                each_row([&](int64_t t) { add_up_slice(t, slice, outputs, to + t * hidden); });
            },
            [&](float *to, const float *from) {
                each_row([&](int64_t t) { add_row(to + t * hidden, from + t * hidden, hidden); });
            }
        );
        if (call_.wide_out != nullptr) return;
        each_row([&](int64_t t) {
            for (int64_t i = 0; i < hidden; i += WIDTH)
                store_first(call_.out + t * hidden + i, load_first(sums + t * hidden + i, hidden - i), hidden - i);
        });
    }

    // A token's experts, over one slice of their inputs; biases belong to the first.
    void add_up_slice(int64_t t, int64_t slice, const float *outputs, float *to) const {
        const int64_t size = call_.hidden_size, count = router_.num_chosen;
        for (int64_t i = 0; i < size; i += WIDTH) {
            Vec sum = splat(0.0f);
            for (int64_t k = t * count; k < (t + 1) * count; ++k) {
                const Expert &expert = call_.layer->experts[chosen_[k]];
                if (expert.up.values == nullptr) continue;
                sum = sum + load_first(outputs + row_of_[k] * size + i, size - i);
                if (slice == 0 && expert.down.bias != nullptr && router_.adds_biases)
                    sum = fma(load_first(expert.down.bias + i, size - i), splat(weights_[k]), sum);
            }
            store_first(to + i, sum, size - i);
        }
    }

    static void add_row(float *to, const float *more, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH)
            store_first(to + i, load_first(to + i, size - i) + load_first(more + i, size - i), size - i);
    }

    const ExpertsCall &call_;
    const Router &router_;
    const Activation &activation_;
    const int64_t num_rows_, ffn_size_;
    const bool is_gate_fused_;
    int64_t num_slices_ = 1;  // of the second layers' inputs
    uint16_t *in_ = nullptr, *up_ = nullptr, *activated_ = nullptr;
    float *weights_ = nullptr;  // [T][chosen], behind them the router's outputs
    int32_t *chosen_ = nullptr, *row_of_ = nullptr, *source_of_ = nullptr;  // [T][chosen] twice; of a row, its place there
    std::vector<int64_t> first_row_of_;  // of each expert, and the end
    std::vector<LinearCall> linears_;
};

}  // namespace

void add_up_experts(const ExpertsCall &call) {
    if (call.num_tokens > 0) Experts(call).run();
}

extern "C" int medha_experts(const ExpertsCall *call) {
    return is_out_of_memory([&] { add_up_experts(*call); });
}
