// What lies between a layer's products, each in one pass: norms and the MLP's activation. fp32 inside.

#include <cmath>
#include <cstdint>
#include <new>

#include "activation.h"
#include "calls.h"
#include "parallel_for.h"
#include "rows.h"
#include "simd.h"
#include "spin_pool.h"
#include "storage.h"
#include "sums.h"

namespace {

// Numbers below which a second thread costs more than it saves (some 50 us of work).
constexpr int64_t MIN_PARALLEL_NUMBERS = 1 << 17;
constexpr int64_t ROWS_OF_ITEM = 16, ROWS_OF_AWAKE_ITEM = 2;

// body(row) for every row
template <class Body>
void each_row(const PassCall &call, const Body &body) {
    const bool has_small_items = is_spinning(call.run_parallel) && call.num_rows < 4 * ROWS_OF_ITEM;
    const int64_t size = has_small_items ? ROWS_OF_AWAKE_ITEM : ROWS_OF_ITEM;
    const int64_t num_items = (call.num_rows + size - 1) / size, num_numbers = call.num_rows * call.width;
    const int64_t threads = useful_threads(call.run_parallel, call.num_threads, num_numbers, MIN_PARALLEL_NUMBERS);
    parallel_for(call.run_parallel, threads, num_items, [&](int64_t item) {
        const int64_t end = std::min((item + 1) * size, call.num_rows);
        for (int64_t row = item * size; row < end; ++row) body(row);
    });
}

template <class T>
void norm(const PassCall &call) {
    const int64_t width = call.width;
    const T *const in = static_cast<const T *>(call.in);
    T *const out = static_cast<T *>(call.out);
    each_row(call, [&](int64_t row) {
        static thread_local Buffer memory;
        norm_row(*call.norm, in + row * width, width, memory.at_least<float>(width + WIDTH), out + row * width);
    });
}

template <class T>
void activate(const PassCall &call) {
    const int64_t width = call.width, num_inputs = call.activation->has_gate ? 2 * width : width;
    const T *const in = static_cast<const T *>(call.in);
    T *const out = static_cast<T *>(call.out);
    each_row(call, [&](int64_t row) {
        activate_row(*call.activation, in + row * num_inputs, width, out + row * width);
    });
}

}  // namespace

extern "C" int medha_norm(const PassCall *call) {
    return is_out_of_memory([&] { call->is_bf16 ? norm<uint16_t>(*call) : norm<float>(*call); });
}

extern "C" int medha_activate(const PassCall *call) {
    return is_out_of_memory([&] { call->is_bf16 ? activate<uint16_t>(*call) : activate<float>(*call); });
}
