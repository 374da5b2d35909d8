// A row of numbers: widened, and normalised.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"
#include "storage.h"

// Up to a multiple of WIDTH, filled with zeros.
template <class T>
static inline void widen_row(const T *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    for (int64_t i = count; i % WIDTH != 0; ++i) to[i] = 0.0f;
}

// out = in / sqrt(mean of squares + epsilon) * weight; memory: for `width` rounded up to a multiple of WIDTH.
template <class T>
static inline void rms_norm_row(
    const T *in, const T *weight, float epsilon, int64_t width, float *memory, T *out
) {
    widen_row(in, memory, width);
    Vec squares = splat(0.0f);
    for (int64_t i = 0; i < width; i += WIDTH) squares = fma(load(memory + i), load(memory + i), squares);
    const float scale = 1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) from_float(memory[i] * scale * to_float(weight[i]), out + i);
}
