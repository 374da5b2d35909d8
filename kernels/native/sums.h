// What rows have gathered of the keys they have seen, how two such parts are merged, and memory for them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <utility>

#include "simd.h"
#include "storage.h"

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// Memory that is kept for the next call.
class Buffer {
  public:
    Buffer() = default;
    Buffer(Buffer &&other) noexcept { *this = std::move(other); }
    Buffer &operator=(Buffer &&other) noexcept {
        std::swap(memory_, other.memory_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
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

// Online softmax of some rows over some keys: maximum, sum of weights, weighted values.
struct Sums {
    float *max, *total, *values;  // [rows], [rows], [rows][dim]

    // Values lie at a multiple of 64 bytes if `memory` does: a row of a matrix tile is one line of the cache then.
    static int64_t size(int64_t rows, int64_t dim) { return before_values(rows) + rows * dim; }
    static int64_t before_values(int64_t rows) { return (rows * 2 + 15) / 16 * 16; }
    Sums() : max(nullptr), total(nullptr), values(nullptr) {}
    Sums(float *memory, int64_t rows) : max(memory), total(memory + rows), values(memory + before_values(rows)) {}
    // Add keys seen later. A row that has seen none on either side takes the other side's numbers as they are.
    void merge(const Sums &later, int64_t rows, int64_t dim) {
        // Powers of some rows at once: those of a row alone take longer than its values. What is loaded behind the last
        // row is part of the same memory, and not looked at.
        for (int64_t first = 0; first < rows; first += WIDTH) {
            const Vec seen = load(max + first), seen_later = load(later.max + first), both = ::max(seen, seen_later);
            const Vec mine = exp2_of_nonpositive(seen - both), theirs = exp2_of_nonpositive(seen_later - both);
            float maxima[WIDTH], totals[WIDTH], of_mine[WIDTH], of_theirs[WIDTH];
            store(maxima, both);
            store(totals, fma(load(later.total + first), theirs, load(total + first) * mine));
            store(of_mine, mine);
            store(of_theirs, theirs);
            for (int64_t r = first; r < std::min(first + WIDTH, rows); ++r) {
                if (later.max[r] == MINUS_INFINITY) continue;
                float *const a = values + r * dim;
                const float *const b = later.values + r * dim;
                const bool is_first = max[r] == MINUS_INFINITY;
                max[r] = maxima[r - first];
                total[r] = is_first ? later.total[r] : totals[r - first];
                if (is_first)
                    std::copy_n(b, dim, a);
                else
                    merge_row(a, of_mine[r - first], b, of_theirs[r - first], dim);
            }
        }
    }

  private:
    static void merge_row(float *a, float of_a, const float *b, float of_b, int64_t dim) {
        const Vec mine = splat(of_a), theirs = splat(of_b);
        for (int64_t i = 0; i < dim; i += WIDTH) store(a + i, fma(load(b + i), theirs, load(a + i) * mine));
    }
};

// The same while keys are added: weights are summed in each lane of a vector, and over the lanes at the end.
struct GrowingSums : Sums {
    float *lanes;  // [rows][WIDTH]

    GrowingSums(const Sums &sums, float *lanes, int64_t rows, int64_t dim) : Sums(sums), lanes(lanes) {
        std::fill_n(max, rows, MINUS_INFINITY);
        std::fill_n(values, rows * dim, 0.0f);
        std::fill_n(lanes, rows * WIDTH, 0.0f);
    }
    void finish(int64_t rows) {
        for (int64_t r = 0; r < rows; ++r) total[r] = reduce_add(load(lanes + r * WIDTH));
    }
};

constexpr double LN_2 = 0.693147180559945309417;

// One divided by the sum of a row's weights and that of its sink, all relative to its maximum.
inline float share_beside(float sink, float max, float total) {
    const float score = static_cast<float>(sink / LN_2), both = std::max(max, score);
    const Vec weights = exp2_of_nonpositive(splat(max - both)), of_sink = exp2_of_nonpositive(splat(score - both));
    return first_lane(weights) / first_lane(fma(splat(total), weights, of_sink));
}

// A row's output, and the natural logarithm of its sum of weights (or null); 0 and -inf where it has seen no key.
// sink: a score beside those of the keys, which is not part of the logarithm; or null.
template <class T>
inline void write_row(
    const Sums &sums, int64_t row, int64_t padded_dim, int64_t head_dim, const float *sink, T *out, float *lse
) {
    const bool is_empty = sums.max[row] == MINUS_INFINITY;
    const float share = is_empty          ? 0.0f
                        : sink != nullptr ? share_beside(*sink, sums.max[row], sums.total[row])
                                          : 1.0f / sums.total[row];
    const float *const values = sums.values + row * padded_dim;
    for (int64_t d = 0; d < head_dim; ++d) from_float(is_empty ? 0.0f : values[d] * share, out + d);
    if (lse == nullptr) return;
    const double log_2 = sums.max[row] + std::log2(static_cast<double>(sums.total[row]));
    *lse = is_empty ? MINUS_INFINITY : static_cast<float>(log_2 * LN_2);
}
