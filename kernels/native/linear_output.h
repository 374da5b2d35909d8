// What every kernel of linear layers shares: how weights are packed, and how sums become outputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "calls.h"
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

// Scale, bias, rounding and residual for `width` sums of a row, from output `first` on; those past the last are dropped.
inline void write_outputs(const LinearCall &call, int64_t row, int64_t first, int64_t width, const float *sums) {
    const int64_t count = std::min(width, call.num_outputs - first), at = row * call.num_outputs + first;
    const auto finished = [&](int64_t o) {
        Vec sum = load(sums + o);
        if (call.scales != nullptr) sum = sum * load_first(call.scales + first + o, count - o);
        if (call.bias != nullptr) sum = sum + load_first(call.bias + first + o, count - o);
        if (call.residual == nullptr) return sum;
        uint16_t rounded[WIDTH];
        store(rounded, sum);
        return load_first(call.residual + at + o, count - o) + load(rounded);
    };
    int64_t o = 0;
    for (; o + 2 * WIDTH <= count; o += 2 * WIDTH) store_two(call.out + at + o, finished(o), finished(o + WIDTH));
    for (; o < count; o += WIDTH) {
        uint16_t rounded[WIDTH];
        store(rounded, finished(o));
        std::copy_n(rounded, std::min<int64_t>(WIDTH, count - o), call.out + at + o);
    }
}
