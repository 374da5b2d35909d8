// Linear layers by dot products of bf16 pairs (AVX512-BF16), for processors without matrix tiles.
//
// Weights lie as linear.cpp says: a vector of them is the two inputs of a pair for 16 outputs. An output is the sum over
// pairs in ascending order (of each slice, slices.h), in each the second product before the first, all by fused
// multiply-adds; so are the
// instruction's own roundings, and a plain version without it has the same bits.
#pragma once

#if defined(MEDHA_PAIRS) || defined(MEDHA_PLAIN_PAIRS)
#define HAS_PAIRS 1

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "calls.h"
#include "linear_output.h"
#include "padded_rows.h"
#include "simd.h"
#include "slices.h"
#include "storage.h"
#include "sums.h"

#if defined(MEDHA_PAIRS)

using Pairs = __m512bh;  // of 16 outputs, or one pair 16 times
inline Pairs pairs_of(__m512i bits) {
    Pairs pairs;
    std::memcpy(&pairs, &bits, sizeof pairs);
    return pairs;
}
inline Pairs load_weights(const uint16_t *from) { return pairs_of(_mm512_loadu_si512(from)); }
inline Pairs load_weights(const int8_t *from) {
    uint16_t pairs[2 * WIDTH];  // the compiler keeps them in a register
    store_pairs(pairs, load_bytes(from), load_bytes(from + PACKED));
    return load_weights(pairs);
}
inline Pairs load_weights(Int4Place from) {
    Vec first, second;
    load_two(from, first, second);
    uint16_t pairs[2 * WIDTH];
    store_pairs(pairs, first, second);
    return load_weights(pairs);
}
inline Pairs splat_pair(const uint16_t *from) {
    int32_t both;
    std::memcpy(&both, from, sizeof both);
    return pairs_of(_mm512_set1_epi32(both));
}
inline Vec add_dot(Vec sum, Pairs inputs, Pairs weights) { return _mm512_dpbf16_ps(sum, inputs, weights); }

#else

struct Pairs {
    Vec first, second;
};
inline Pairs load_weights(const uint16_t *from) {
    Pairs pairs;
    load_pairs(from, pairs.first, pairs.second);
    return pairs;
}
inline Pairs load_weights(const int8_t *from) { return {load_bytes(from), load_bytes(from + PACKED)}; }
inline Pairs load_weights(Int4Place from) {
    Pairs pairs;
    load_two(from, pairs.first, pairs.second);
    return pairs;
}
inline Pairs splat_pair(const uint16_t *from) { return {splat(to_float(from[0])), splat(to_float(from[1]))}; }
inline Vec add_dot(Vec sum, Pairs inputs, Pairs weights) {
    return fma(inputs.first, weights.first, fma(inputs.second, weights.second, sum));
}

#endif

template <class Weight>
inline const char *bytes_at(const Weight *from) { return reinterpret_cast<const char *>(from); }
inline const char *bytes_at(Int4Place from) { return reinterpret_cast<const char *>(from.pairs); }

template <class W>
class PairLinear : public PaddedRows {
  public:
    explicit PairLinear(const LinearCall &call)
        : PaddedRows(call), num_packs_((call.num_outputs + PACKED - 1) / PACKED / (call.is_gated ? 2 : 1)) {}

    static constexpr int64_t MIN_PARALLEL_WORK = 1 << 20;  // multiplications; some 50 us of them

    int64_t work() const { return call_.num_rows * slices_.size() * call_.num_outputs; }

    int64_t cut(int64_t num_threads) {
        if (call_.num_rows == 0) return num_items_ = 0;
        // Several packs an item for few rows: a run of memory that the processor's prefetching follows.
        if (call_.num_rows <= MAX_ROWS) return num_items_ = std::min(num_packs_, 4 * num_threads);
        num_blocks_ = (call_.num_rows + MAX_ROWS_OF_ITEM - 1) / MAX_ROWS_OF_ITEM;
        return num_items_ = num_packs_ * num_blocks_;
    }

    void run(int64_t i) const {
        if (call_.num_rows <= MAX_ROWS) {
            for (int64_t p = num_packs_ * i / num_items_; p < num_packs_ * (i + 1) / num_items_; ++p) multiply_few(p);
            return;
        }
        const int64_t block = i / num_packs_, num_rows = call_.num_rows;
        multiply_many(i % num_packs_, num_rows * block / num_blocks_, num_rows * (block + 1) / num_blocks_);
    }

  private:
    static constexpr int MAX_TILE_ROWS = 6;             // by a whole pack; 24 sums and 5 operands fill the registers
    static constexpr int MAX_ROWS = 2 * MAX_TILE_ROWS;  // by half a pack, so that weights are read once
    static constexpr int64_t MAX_ROWS_OF_ITEM = 96;
    static constexpr int64_t AHEAD = 4096;  // bytes: what decodes fetch beforehand
    static constexpr int columns_of(int num_rows) { return num_rows <= MAX_TILE_ROWS ? 4 : 2; }
    static_assert(WIDTH == 16, "a pack is four vectors");

    const W *pack_of(int64_t pack) const {
        return advance(static_cast<const W *>(call_.weight.values), (pack * depth_ + slices_.first()) * PACKED);
    }

    static const uint16_t *at(const uint16_t *pack, int64_t d, int64_t o) { return pack + d * PACKED + 2 * o; }
    static const int8_t *at(const int8_t *pack, int64_t d, int64_t o) { return pack + d * PACKED + o; }
    static Int4Place at(const Int4Group *pack, int64_t d, int64_t o) { return place(pack, d, o); }

    // R rows, `stride` apart, by C vectors of outputs from output o of a pack; sums [R][PACKED].
    template <class Weight, int R, bool FETCHES>
    static void multiply(
        const Weight *pack, int64_t o, const uint16_t *rows, int64_t stride, int64_t depth, float *sums
    ) {
        constexpr int C = columns_of(R);
        Vec sum[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sum[r][c] = splat(0.0f);
        for (int64_t d = 0; d < depth; d += 2) {
            Pairs weights[C];
            for (int c = 0; c < C; ++c) {
                const auto from = at(pack, d, o + c * WIDTH);
                weights[c] = load_weights(from);
                if (FETCHES) __builtin_prefetch(bytes_at(from) + AHEAD);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const Pairs inputs = splat_pair(rows + r * stride + d);
                for (int c = 0; c < C; ++c) sum[r][c] = add_dot(sum[r][c], inputs, weights[c]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) store(sums + r * PACKED + o + c * WIDTH, sum[r][c]);
    }

    template <class Weight>
    using Multiply = void (*)(const Weight *, int64_t, const uint16_t *, int64_t, int64_t, float *);
    template <class Weight, bool FETCHES, int... R>
    static Multiply<Weight> multiply_of(int64_t num_rows, std::integer_sequence<int, R...>) {
        static constexpr Multiply<Weight> all[] = {multiply<Weight, R + 1, FETCHES>...};
        return all[num_rows - 1];
    }

    // All rows, which are few, by one pack (and the one it gates), as it comes from memory.
    void multiply_few(int64_t pack) const {
        constexpr int64_t SIZE = MAX_ROWS * PACKED;
        alignas(64) float sums[2][SIZE], tree[MAX_TREE_DEPTH * SIZE];
        const int num_rows = static_cast<int>(call_.num_rows);
        const auto multiply_rows = multiply_of<W, true>(num_rows, std::make_integer_sequence<int, MAX_ROWS>());
        for (int h = 0; h <= call_.is_gated; ++h)
            add_up_slices(0, slices_.num_slices, sums[h], num_rows * PACKED, tree, [&](int64_t slice, float *to) {
                const int64_t d = slice * slices_.depth;
                const W *const weights = advance(pack_of(h * num_packs_ + pack), d * PACKED);
                for (int64_t o = 0; o < PACKED; o += columns_of(num_rows) * WIDTH)
                    multiply_rows(weights, o, row(0) + d, depth_, slices_.depth, to);
            });
        write_rows(pack, 0, num_rows, sums[0], sums[1]);
    }

    // Rows [first, end) by one pack (and the one it gates), tile by tile; narrow weights are widened once for all.
    void multiply_many(int64_t pack, int64_t first, int64_t end) const {
        constexpr int64_t SIZE = MAX_TILE_ROWS * PACKED;
        alignas(64) float sums[2][SIZE], tree[MAX_TREE_DEPTH * SIZE];
        static thread_local Buffer memory;
        const uint16_t *weights[2] = {};
        for (int h = 0; h <= call_.is_gated; ++h) weights[h] = pairs_of_pack(h * num_packs_ + pack, h, memory);
        const int64_t num_tiles = (end - first + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
        for (int64_t t = 0; t < num_tiles; ++t) {
            const int64_t begin = first + (end - first) * t / num_tiles;
            const int64_t num_rows = first + (end - first) * (t + 1) / num_tiles - begin;
            const auto multiply_rows =
                multiply_of<uint16_t, false>(num_rows, std::make_integer_sequence<int, MAX_TILE_ROWS>());
            for (int h = 0; h <= call_.is_gated; ++h)
                add_up_slices(0, slices_.num_slices, sums[h], num_rows * PACKED, tree, [&](int64_t slice, float *to) {
                    const int64_t d = slice * slices_.depth;
                    multiply_rows(weights[h] + d * PACKED, 0, row(begin) + d, depth_, slices_.depth, to);
                });
            write_rows(pack, begin, num_rows, sums[0], sums[1]);
        }
    }

    const uint16_t *pairs_of_pack(int64_t pack, int half, Buffer &memory) const {
        if constexpr (IS_BF16<W>) {
            return pack_of(pack);
        } else {
            const int64_t depth = slices_.size(), size = depth * PACKED;
            uint16_t *const widened = memory.at_least<uint16_t>((1 + call_.is_gated) * size) + half * size;
            widen_pairs(pack_of(pack), depth, widened);
            return widened;
        }
    }

    void write_rows(int64_t pack, int64_t first, int64_t num_rows, const float *sums, const float *gated) const {
        for (int64_t r = 0; r < num_rows; ++r)
            if (call_.is_gated)
                write_gated(call_, first + r, pack * PACKED, sums + r * PACKED, gated + r * PACKED);
            else
                write_outputs(call_, first + r, pack * PACKED, PACKED, sums + r * PACKED);
    }

    const int64_t num_packs_;
    int64_t num_items_ = 0, num_blocks_ = 0;
};

#endif
