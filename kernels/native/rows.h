// A row of numbers: its last vector, and norms.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "calls.h"
#include "simd.h"
#include "storage.h"

// The first `count` numbers, filled up with zeros.
template <class T>
inline Vec load_first(const T *from, int64_t count) {
    if (count >= WIDTH) return load(from);
    T padded[WIDTH] = {};
    std::copy_n(from, std::max<int64_t>(0, count), padded);
    return load(padded);
}

template <class T>
inline void store_first(T *to, Vec x, int64_t count) {
    if (count >= WIDTH) return store(to, x);
    T last[WIDTH];
    store(last, x);
    std::copy_n(last, count, to);
}

// out = in / sqrt(mean of squares + epsilon) * weight + bias, less the mean before if the norm is a centred one;
// memory: for `width` rounded up to a multiple of WIDTH. `out` may be `in`.
template <class T>
static inline void norm_row(const Norm &norm, const T *in, int64_t width, float *memory, T *out) {
    const auto mean_of = [&](const auto &of) {
        Vec sum = splat(0.0f);
        for (int64_t i = 0; i < width; i += WIDTH) sum = of(load(memory + i), sum);
        return reduce_add(sum) / static_cast<float>(width);
    };
    for (int64_t i = 0; i < width; i += WIDTH) store(memory + i, load_first(in + i, width - i));
    if (norm.is_centred) {
        const float mean = mean_of([](Vec x, Vec sum) { return sum + x; });
        for (int64_t i = 0; i < width; ++i) memory[i] -= mean;
    }
    const float scale = 1.0f / std::sqrt(mean_of([](Vec x, Vec sum) { return fma(x, x, sum); }) + norm.epsilon);
    for (int64_t i = 0; i < width; i += WIDTH) {
        const int64_t count = width - i;
        const Vec x = load(memory + i) * splat(scale), weight = load_first(norm.weight + i, count);
        store_first(
            out + i, norm.bias == nullptr ? x * weight : fma(x, weight, load_first(norm.bias + i, count)), count
        );
    }
}
