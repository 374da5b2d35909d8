// What lies between a layer's products, each in one pass: RMS norm, and the gated MLP's silu(gate) * up. fp32 inside.

#include <cmath>
#include <cstdint>
#include <new>

#include "calls.h"
#include "parallel_for.h"
#include "rows.h"
#include "silu.h"
#include "simd.h"
#include "spin_pool.h"
#include "storage.h"
#include "sums.h"

namespace {

// Numbers below which a second thread costs more than it saves (some 50 us of work).
constexpr int64_t MIN_PARALLEL_NUMBERS = 1 << 17;
constexpr int64_t ROWS_OF_ITEM = 16, ROWS_OF_AWAKE_ITEM = 2;

// body(row, fp32 memory for `memory_rows` rows) for every row
template <class Body>
void each_row(const PassCall &call, int64_t memory_rows, const Body &body) {
    const bool has_small_items = is_spinning(call.run_parallel) && call.num_rows < 4 * ROWS_OF_ITEM;
    const int64_t size = has_small_items ? ROWS_OF_AWAKE_ITEM : ROWS_OF_ITEM;
    const int64_t num_items = (call.num_rows + size - 1) / size, num_numbers = call.num_rows * call.width;
    const int64_t threads = useful_threads(call.run_parallel, call.num_threads, num_numbers, MIN_PARALLEL_NUMBERS);
    parallel_for(call.run_parallel, threads, num_items, [&](int64_t item) {
        static thread_local Buffer memory;
        float *const rows = memory.at_least<float>(memory_rows * (call.width + WIDTH));
        const int64_t end = std::min((item + 1) * size, call.num_rows);
        for (int64_t row = item * size; row < end; ++row) body(row, rows);
    });
}

template <class T>
void rms_norm(const PassCall &call) {
    const int64_t width = call.width;
    const T *const in = static_cast<const T *>(call.in), *const weight = static_cast<const T *>(call.weight);
    T *const out = static_cast<T *>(call.out);
    each_row(call, 1, [&](int64_t row, float *x) {
        rms_norm_row(in + row * width, weight, call.epsilon, width, x, out + row * width);
    });
}

template <class T>
void gated_silu(const PassCall &call) {
    const int64_t width = call.width;
    const T *const in = static_cast<const T *>(call.in);
    T *const out = static_cast<T *>(call.out);
    each_row(call, 2, [&](int64_t row, float *gate) {
        float *const up = gate + width + WIDTH;
        widen_row(in + row * 2 * width, gate, width);
        widen_row(in + (row * 2 + 1) * width, up, width);
        for (int64_t i = 0; i < width; i += WIDTH) store(gate + i, silu(load(gate + i)) * load(up + i));
        for (int64_t i = 0; i < width; ++i) from_float(gate[i], out + row * width + i);
    });
}

}  // namespace

extern "C" int medha_rms_norm(const PassCall *call) {
    return is_out_of_memory([&] { call->is_bf16 ? rms_norm<uint16_t>(*call) : rms_norm<float>(*call); });
}

extern "C" int medha_gated_silu(const PassCall *call) {
    return is_out_of_memory([&] { call->is_bf16 ? gated_silu<uint16_t>(*call) : gated_silu<float>(*call); });
}
