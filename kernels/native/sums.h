// What rows have gathered of the keys they have seen, how two such parts are merged, and memory for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

#include "simd.h"

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// Memory that is kept for the next call.
class Buffer {
  public:
    ~Buffer() { std::free(memory_); }
    template <class T>
    T *at_least(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > bytes_) {
            std::free(memory_);
            bytes_ = 0;
            memory_ = std::aligned_alloc(64, bytes);
            if (memory_ == nullptr) throw std::bad_alloc();
            bytes_ = bytes;
        }
        return static_cast<T *>(memory_);
    }

  private:
    void *memory_ = nullptr;
    size_t bytes_ = 0;
};

// Online softmax of some rows: maximum, sum of weights (each a vector's lanes, added at the end), weighted values.
struct Sums {
    float *max, *total, *values;  // [rows], [rows][WIDTH], [rows][dim]

    // Values lie at a multiple of 64 bytes if `memory` does: a row of a matrix tile is one line of the cache then.
    static int64_t size(int64_t rows, int64_t dim) { return before_values(rows) + rows * dim; }
    static int64_t before_values(int64_t rows) { return (rows * (1 + WIDTH) + 15) / 16 * 16; }
    Sums(float *memory, int64_t rows) : max(memory), total(memory + rows), values(memory + before_values(rows)) {}
    void clear(int64_t rows, int64_t dim) {
        std::fill_n(max, rows, MINUS_INFINITY);
        std::fill_n(total, rows * WIDTH, 0.0f);
        std::fill_n(values, rows * dim, 0.0f);
    }
    // Add keys seen later. Rows that have seen none have maximum -inf and weight 0.
    void merge(const Sums &later, int64_t rows, int64_t dim) {
        for (int64_t r = 0; r < rows; ++r) {
            if (later.max[r] == MINUS_INFINITY) continue;
            const float both = std::max(max[r], later.max[r]);
            const Vec mine = exp2_of_nonpositive(splat(max[r] - both));
            const Vec theirs = exp2_of_nonpositive(splat(later.max[r] - both));
            max[r] = both;
            float *a = total + r * WIDTH, *b = values + r * dim;
            const float *c = later.total + r * WIDTH, *d = later.values + r * dim;
            store(a, fma(load(c), theirs, load(a) * mine));
            for (int64_t i = 0; i < dim; i += WIDTH) store(b + i, fma(load(d + i), theirs, load(b + i) * mine));
        }
    }
};
