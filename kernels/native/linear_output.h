// What every kernel of linear layers shares: how weights are packed, and how sums become outputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "calls.h"
#include "silu.h"
#include "simd.h"

constexpr int64_t PACKED = 64;  // outputs that lie together

// Inputs of a packed weight: zeros fill up what a matrix tile takes at once.
constexpr int64_t padded_inputs(int64_t num_inputs) { return (num_inputs + 31) / 32 * 32; }

// The first `count` numbers, filled up with zeros.
template <class T>
inline Vec load_first(const T *from, int64_t count) {
    if (count >= WIDTH) return load(from);
    T padded[WIDTH] = {};
    std::copy_n(from, std::max<int64_t>(0, count), padded);
    return load(padded);
}

// Sums of a row's outputs from `first` on, scaled and with their bias; `count` outputs are left.
inline Vec whole_sum(const LinearCall &call, const float *sums, int64_t first, int64_t count) {
    Vec sum = load(sums);
    if (call.scales != nullptr) sum = sum * load_first(call.scales + first, count);
    if (call.bias != nullptr) sum = sum + load_first(call.bias + first, count);
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
    for (; o + 2 * WIDTH <= count; o += 2 * WIDTH) store_two(out + o, finished(o), finished(o + WIDTH));
    for (; o < count; o += WIDTH) {
        uint16_t last[WIDTH];
        store(last, finished(o));
        std::copy_n(last, std::min<int64_t>(WIDTH, count - o), out + o);
    }
}

// The same for silu(gate) * up of PACKED outputs from `first` on, each half rounded before, as gated_silu reads them.
inline void write_gated(const LinearCall &call, int64_t row, int64_t first, const float *gate, const float *up) {
    const int64_t half = call.num_outputs / 2;
    uint16_t *const out = call.out + row * half + first;
    const auto finished = [&](int64_t o) {
        const Vec open = rounded(whole_sum(call, gate + o, first + o, WIDTH));
        return silu(open) * rounded(whole_sum(call, up + o, half + first + o, WIDTH));
    };
    for (int64_t o = 0; o < PACKED; o += 2 * WIDTH) store_two(out + o, finished(o), finished(o + WIDTH));
}
