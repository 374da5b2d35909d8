// The two products of attention over one tile of keys by matrix tiles (matrix_tiles.h), for chunks and decodes alike.
//
// Keys and values are read as they lie in the pool. Scores are fp32 sums of bf16 products, and the softmax is fp32; its
// weights are rounded to bf16 for the product with the values, as a GPU's kernels do it, their sum is not. A row's bits
// depend on its own keys alone: those of each 32 are added at once, those of a tile in order.
#pragma once

#include "matrix_tiles.h"

#if defined(HAS_MATRIX_TILES)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"
#include "prefetcher.h"
#include "simd.h"
#include "sums.h"
#include "tiles.h"

constexpr int64_t PAIR_ROWS = 2 * TILE_ROWS;  // of queries that are multiplied together
static_assert(GROUP == TILE_ROWS && TILE_GROUPS % 4 == 0 && TILE_DEPTH == 2 * GROUP, "groups of keys are matrix tiles");

constexpr int64_t padded_depth(int64_t dim) { return (dim + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH; }

// One tile of keys as its products read it, and what they leave for 32 rows.
class KeyTile {
  public:
    static int64_t memory_size(int64_t dim) {  // in floats
        const int64_t values = TILE_KEYS * dim / 2, keys = TILE_GROUPS * TILE_DEPTH * GROUP / 2;
        return PAIR_ROWS * TILE_KEYS + PAIR_ROWS * TILE_KEYS + PAIR_ROWS + values + keys;
    }

    KeyTile(const KeyGroup<uint16_t> *groups, int num_groups, int64_t dim, float *memory)
        : groups_(groups),
          num_groups_(num_groups),
          num_padded_((num_groups + 3) / 4 * 4),
          dim_(dim),
          scores_(memory),
          decay_(scores_ + PAIR_ROWS * TILE_KEYS),
          weights_(reinterpret_cast<uint16_t *>(decay_ + PAIR_ROWS)) {
        uint16_t *const values = weights_ + 2 * PAIR_ROWS * TILE_KEYS, *keys = values + TILE_KEYS * dim;
        for (int g = 0; g < num_padded_; ++g) keys_[g] = groups[std::min(g, num_groups - 1)].k;
        for (int g = 0; g < num_padded_; ++g) last_keys_[g] = keys_[g] + (padded_depth(dim) - TILE_DEPTH) * GROUP;
        if (dim % TILE_DEPTH != 0)  // what lies behind the last dimensions is another group
            for (int g = 0; g < num_groups; ++g, keys += TILE_DEPTH * GROUP) {
                std::copy_n(last_keys_[g], TILE_DEPTH / 2 * GROUP, keys);
                std::fill_n(keys + TILE_DEPTH / 2 * GROUP, TILE_DEPTH / 2 * GROUP, 0);
                last_keys_[g] = keys;
            }
        for (int g = 0; g < num_groups; g += 2) {
            const bool lies_together = g + 1 < num_groups && is_full(groups[g]) && is_full(groups[g + 1]) &&
                                       groups[g + 1].v == groups[g].v + GROUP * dim;
            uint16_t *const copy = values + g * GROUP * dim;
            values_[g / 2] = lies_together ? groups[g].v : copy;
            if (lies_together) continue;
            copy_values(groups[g], copy);
            if (g + 1 < num_groups)
                copy_values(groups[g + 1], copy + GROUP * dim);
            else
                std::fill_n(copy + GROUP * dim, GROUP * dim, 0);
        }
    }

    // Scores of rows with these queries, not scaled yet; queries: [rows][padded_depth].
    float *score(const uint16_t *queries, int64_t num_rows, Prefetcher &next) {
        if (num_rows > TILE_ROWS)
            for (int g = 0; g < num_padded_; g += 2) score_pairs(queries, g, next);
        else
            for (int g = 0; g < num_padded_; g += 4) score_rows(queries, g, next);
        return scores_;
    }
    int num_padded() const { return num_padded_; }

    // Scores to weights relative to each row's new maximum; what the sums have gathered before decays.
    // They go to one of two places: the product of one waits for its numbers to be written, so it comes later.
    void softmax(int64_t num_rows, float scale, Sums &sums, int64_t first_row, int place) {
        const int num_vecs = num_padded_;
        for (int64_t r = 0; r < num_rows; ++r) {
            const float *const row = scores_ + r * TILE_KEYS;
            Vec highest = load(row);
            for (int i = 1; i < num_vecs; ++i) highest = max(highest, load(row + i * WIDTH));
            float &seen = sums.max[first_row + r];
            const float new_max = std::max(seen, reduce_max(highest) * scale);
            decay_[r] = 1.0f;
            if (new_max != seen) {
                float lanes[WIDTH];
                store(lanes, exp2_of_nonpositive(splat(seen - finite_max(new_max))));
                decay_[r] = lanes[0];
            }
            seen = new_max;
        }
        for (int64_t r = 0; r < num_rows; ++r) {
            const float *const row = scores_ + r * TILE_KEYS;
            uint16_t *const weights = weights_of(place) + r * TILE_KEYS;
            const Vec origin = splat(-finite_max(sums.max[first_row + r])), factor = splat(scale);
            Vec sum = splat(0.0f);
            for (int i = 0; i < num_vecs; i += 2) {
                const Vec first = exp2_of_nonpositive(fma(load(row + i * WIDTH), factor, origin));
                const Vec second = exp2_of_nonpositive(fma(load(row + (i + 1) * WIDTH), factor, origin));
                store_two(weights + i * WIDTH, first, second);
                sum = sum + first + second;
            }
            float *const total = sums.total + (first_row + r) * WIDTH, *const values = sums.values + (first_row + r) * dim_;
            store(total, fma(load(total), splat(decay_[r]), sum));
            if (decay_[r] != 1.0f)
                for (int64_t d = 0; d < dim_; d += WIDTH) store(values + d, load(values + d) * splat(decay_[r]));
        }
    }

    // values [rows][dim] += weights . values of the keys
    void add_values(float *values, int64_t num_rows, int place, Prefetcher &next) const {
        const uint16_t *const weights = weights_of(place);
        for (int64_t d = 0; d < dim_; d += 2 * GROUP) {
            const bool is_pair = d + GROUP < dim_;
            next.fetch();
            if (num_rows > TILE_ROWS)
                is_pair ? add_pairs<true>(weights, values + d, d) : add_pairs<false>(weights, values + d, d);
            else
                is_pair ? add_rows<true>(weights, values + d, d) : add_rows<false>(weights, values + d, d);
        }
    }

  private:
    uint16_t *weights_of(int place) const { return weights_ + place * PAIR_ROWS * TILE_KEYS; }
    static bool is_full(const KeyGroup<uint16_t> &group) { return group.first_lane == 0 && group.end_lane == GROUP; }
    static float finite_max(float max) { return max == MINUS_INFINITY ? 0.0f : max; }

    // A lane of another sequence, or of none, may hold anything: it must not even be multiplied by 0.
    void copy_values(const KeyGroup<uint16_t> &group, uint16_t *to) const {
        std::copy_n(group.v, GROUP * dim_, to);
        for (int64_t lane = 0; lane < GROUP; ++lane)
            if (lane < group.first_lane || lane >= group.end_lane)
                for (int64_t d = 0; d < dim_; ++d) to[Place<uint16_t>::value(lane, d, dim_)] = 0;
    }

    const uint16_t *keys_at(int g, int64_t d) const {
        return d + TILE_DEPTH < padded_depth(dim_) ? keys_[g] + d * GROUP : last_keys_[g];
    }

    // 32 rows by 2 groups.
    void score_pairs(const uint16_t *queries, int g, Prefetcher &next) const {
        const int64_t depth = padded_depth(dim_);
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        for (int64_t d = 0; d < depth; d += TILE_DEPTH) {
            next.fetch();
            load_tile<4>(queries + d, depth * 2);
            load_tile<6>(keys_at(g, d), GROUP * 4);
            multiply_tiles<0, 4, 6>();
            load_tile<7>(keys_at(g + 1, d), GROUP * 4);
            multiply_tiles<1, 4, 7>();
            load_tile<5>(queries + TILE_ROWS * depth + d, depth * 2);
            multiply_tiles<2, 5, 6>();
            multiply_tiles<3, 5, 7>();
        }
        float *const scores = scores_ + g * GROUP;
        store_tile<0>(scores, TILE_KEYS * 4);
        store_tile<1>(scores + GROUP, TILE_KEYS * 4);
        store_tile<2>(scores + TILE_ROWS * TILE_KEYS, TILE_KEYS * 4);
        store_tile<3>(scores + TILE_ROWS * TILE_KEYS + GROUP, TILE_KEYS * 4);
    }

    // At most 16 rows by 4 groups.
    void score_rows(const uint16_t *queries, int g, Prefetcher &next) const {
        const int64_t depth = padded_depth(dim_);
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        for (int64_t d = 0; d < depth; d += TILE_DEPTH) {
            next.fetch();
            load_tile<4>(queries + d, depth * 2);
            load_tile<6>(keys_at(g, d), GROUP * 4);
            multiply_tiles<0, 4, 6>();
            load_tile<7>(keys_at(g + 1, d), GROUP * 4);
            multiply_tiles<1, 4, 7>();
            load_tile<6>(keys_at(g + 2, d), GROUP * 4);
            multiply_tiles<2, 4, 6>();
            load_tile<7>(keys_at(g + 3, d), GROUP * 4);
            multiply_tiles<3, 4, 7>();
        }
        float *const scores = scores_ + g * GROUP;
        store_tile<0>(scores, TILE_KEYS * 4);
        store_tile<1>(scores + GROUP, TILE_KEYS * 4);
        store_tile<2>(scores + 2 * GROUP, TILE_KEYS * 4);
        store_tile<3>(scores + 3 * GROUP, TILE_KEYS * 4);
    }

    // 32 rows by 32 dimensions from d on, or 16.
    template <bool IS_PAIR>
    void add_pairs(const uint16_t *weights, float *values, int64_t d) const {
        float *const more_rows = values + TILE_ROWS * dim_;
        load_tile<0>(values, dim_ * 4);
        load_tile<2>(more_rows, dim_ * 4);
        if constexpr (IS_PAIR) {
            load_tile<1>(values + GROUP, dim_ * 4);
            load_tile<3>(more_rows + GROUP, dim_ * 4);
        }
        for (int g = 0; g < num_groups_; g += 2) {
            load_tile<4>(weights + g * GROUP, TILE_KEYS * 2);
            load_tile<6>(values_[g / 2] + 2 * d, dim_ * 4);
            multiply_tiles<0, 4, 6>();
            load_tile<5>(weights + TILE_ROWS * TILE_KEYS + g * GROUP, TILE_KEYS * 2);
            multiply_tiles<2, 5, 6>();
            if constexpr (IS_PAIR) {
                load_tile<7>(values_[g / 2] + 2 * (d + GROUP), dim_ * 4);
                multiply_tiles<1, 4, 7>();
                multiply_tiles<3, 5, 7>();
            }
        }
        store_tile<0>(values, dim_ * 4);
        store_tile<2>(more_rows, dim_ * 4);
        if constexpr (IS_PAIR) {
            store_tile<1>(values + GROUP, dim_ * 4);
            store_tile<3>(more_rows + GROUP, dim_ * 4);
        }
    }

    // The same for at most 16 rows.
    template <bool IS_PAIR>
    void add_rows(const uint16_t *weights, float *values, int64_t d) const {
        load_tile<0>(values, dim_ * 4);
        if constexpr (IS_PAIR) load_tile<1>(values + GROUP, dim_ * 4);
        for (int g = 0; g < num_groups_; g += 2) {
            load_tile<4>(weights + g * GROUP, TILE_KEYS * 2);
            load_tile<6>(values_[g / 2] + 2 * d, dim_ * 4);
            multiply_tiles<0, 4, 6>();
            if constexpr (IS_PAIR) {
                load_tile<7>(values_[g / 2] + 2 * (d + GROUP), dim_ * 4);
                multiply_tiles<1, 4, 7>();
            }
        }
        store_tile<0>(values, dim_ * 4);
        if constexpr (IS_PAIR) store_tile<1>(values + GROUP, dim_ * 4);
    }

    const KeyGroup<uint16_t> *groups_;
    const int num_groups_, num_padded_;
    const int64_t dim_;
    float *const scores_, *const decay_;  // [32][TILE_KEYS], [32]
    uint16_t *const weights_;             // [2][32][TILE_KEYS]
    const uint16_t *keys_[TILE_GROUPS], *last_keys_[TILE_GROUPS], *values_[TILE_GROUPS / 2];
};

#endif
