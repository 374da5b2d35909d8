// What every kernel of linear layers shares: how weights are packed, and how sums become outputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "calls.h"
#include "rows.h"
#include "simd.h"

constexpr int64_t PACKED = 64;  // outputs that lie together

// Inputs of a packed weight: zeros fill up what a matrix tile takes at once.
constexpr int64_t padded_inputs(int64_t num_inputs) { return (num_inputs + 31) / 32 * 32; }

#if defined(__AVX512F__)
// int8 weights of two inputs as pairs of bf16, exactly: one run of a tile for each 16 outputs.
inline void widen_pairs(const int8_t *from, int64_t depth, uint16_t *to) {
    for (int64_t d = 0; d < depth; d += 2)
        for (int64_t o = 0; o < PACKED; o += WIDTH)
            store_pairs(to + d * PACKED + 2 * o, load_bytes(from + d * PACKED + o), load_bytes(from + (d + 1) * PACKED + o));
}
#endif

// Sums of a row's outputs from `first` on, scaled and with their bias; `count` outputs are left.
inline Vec whole_sum(const LinearCall &call, const float *sums, int64_t first, int64_t count) {
    Vec sum = load(sums);
    if (call.weight.scales != nullptr) sum = sum * load_first(call.weight.scales + first, count);
    if (call.weight.bias != nullptr) sum = sum + load_first(call.weight.bias + first, count);
    return sum;
}

// Scale, bias, rounding and residual for `width` sums of a row, from output `first` on; those past the last are dropped.
inline void write_outputs(const LinearCall &call, int64_t row, int64_t first, int64_t width, const float *sums) {
    const int64_t count = std::min(width, call.num_outputs - first), at = row * call.num_outputs + first;
    uint16_t *const out = call.out + at;
    const auto finished = [&](int64_t o) {
        const Vec sum = whole_sum(call, sums + o, first + o, count - o);
        return call.residual == nullptr ? sum : load_first(call.residual + at + o, count - o) + rounded(sum);
    };
    int64_t o = 0;
    if (call.wide_out != nullptr) {
        for (; o < count; o += WIDTH) store_first(call.wide_out + at + o, whole_sum(call, sums + o, first + o, count - o), count - o);
        return;
    }
    for (; o + 2 * WIDTH <= count; o += 2 * WIDTH) store_two(out + o, finished(o), finished(o + WIDTH));
    for (; o < count; o += WIDTH) store_first(out + o, finished(o), count - o);
}

// The same for silu(gate) * up of PACKED outputs from `first` on, each half rounded before, as activate_row reads them.
inline void write_gated(const LinearCall &call, int64_t row, int64_t first, const float *gate, const float *up) {
    const int64_t half = call.num_outputs / 2;
    uint16_t *const out = call.out + row * half + first;
    const auto finished = [&](int64_t o) {
        const Vec open = rounded(whole_sum(call, gate + o, first + o, WIDTH));
        return silu(open) * rounded(whole_sum(call, up + o, half + first + o, WIDTH));
    };
    for (int64_t o = 0; o < PACKED; o += 2 * WIDTH) store_two(out + o, finished(o), finished(o + WIDTH));
}
