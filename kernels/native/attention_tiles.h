// The two products of attention over one tile of keys by matrix tiles (matrix_tiles.h), for chunks and decodes alike.
//
// Keys and values are read as they lie in the pool. Scores are fp32 sums of bf16 products, and the softmax is fp32; its
// weights are rounded to bf16 for the product with the values, as a GPU's kernels do it, their sum is not. A row's bits
// depend on its own keys alone: those of each 32 are added at once, those of a tile in order.
//
// The softmax of 32 rows takes vector instructions for about as long as their products take tile instructions, and the
// processor does both at once only where they stand close together: so while the softmax of some rows is computed, the
// products of others are done in between, a step at a time.
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
        return 2 * PAIR_ROWS * TILE_KEYS + values + keys;
    }

    KeyTile(const KeyGroup<uint16_t> *groups, int num_groups, int64_t dim, float *memory)
        : groups_(groups),
          num_groups_(num_groups),
          num_padded_((num_groups + 3) / 4 * 4),
          dim_(dim),
          scores_(memory) {
        uint16_t *const values = reinterpret_cast<uint16_t *>(memory + 2 * PAIR_ROWS * TILE_KEYS);
        uint16_t *keys = values + TILE_KEYS * dim;
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

    int num_padded() const { return num_padded_; }

    // One of two places, each for 32 rows: [32][TILE_KEYS] scores, and in their stead the weights, as bf16.
    float *place(int64_t index) const { return scores_ + index % 2 * PAIR_ROWS * TILE_KEYS; }

    // Products of 32 rows at most that are done in steps of four tile products or fewer.
    class Steps {
      public:
        Steps(const KeyTile &tile, int64_t num_rows) : tile_(tile), is_pair_(num_rows > TILE_ROWS) {}

        // values [rows][dim] += weights at `from` . values of the keys
        void add_values(const float *from, float *values, Prefetcher &next) {
            weights_ = reinterpret_cast<const uint16_t *>(from);
            values_ = values;
            next_values_ = &next;
            num_left_ += (tile_.dim_ + 2 * GROUP - 1) / (2 * GROUP) * ((tile_.num_groups_ + 1) / 2);
        }
        // scores at `to`, not scaled yet, of queries [rows][padded_depth]; after the values, if both are to be done
        void score(const uint16_t *queries, float *to, Prefetcher &next) {
            queries_ = queries;
            scores_ = to;
            next_keys_ = &next;
            num_left_ += padded_depth(tile_.dim_) / TILE_DEPTH * (tile_.num_padded_ / (is_pair_ ? 2 : 4));
        }
        int64_t num_left() const { return num_left_; }
        void run(int64_t count) {
            for (; count > 0 && num_left_ > 0; --count, --num_left_) weights_ != nullptr ? value_step() : score_step();
        }
        void finish() { run(num_left_); }

      private:
        void value_step() {
            const bool is_last = group_ + 2 >= tile_.num_groups_;
            next_values_->fetch();
            if (is_pair_)
                tile_.add_pairs(weights_, values_, depth_, group_, is_last);
            else
                tile_.add_rows(weights_, values_, depth_, group_, is_last);
            group_ += 2;
            if (!is_last) return;
            group_ = 0;
            depth_ += 2 * GROUP;
            if (depth_ < tile_.dim_) return;
            depth_ = 0;
            weights_ = nullptr;
        }
        void score_step() {
            const bool is_last = depth_ + TILE_DEPTH >= padded_depth(tile_.dim_);
            next_keys_->fetch();
            if (is_pair_)
                tile_.score_pairs(queries_, scores_, depth_, group_, is_last);
            else
                tile_.score_rows(queries_, scores_, depth_, group_, is_last);
            depth_ += TILE_DEPTH;
            if (!is_last) return;
            depth_ = 0;
            group_ += is_pair_ ? 2 : 4;
            if (group_ >= tile_.num_padded_) group_ = 0;
        }

        const KeyTile &tile_;
        const bool is_pair_;
        const uint16_t *weights_ = nullptr, *queries_ = nullptr;
        float *values_ = nullptr, *scores_ = nullptr;
        Prefetcher *next_values_ = nullptr, *next_keys_ = nullptr;
        int64_t num_left_ = 0, depth_ = 0;
        int group_ = 0;
    };

    // Scores to weights relative to each row's new maximum; what the sums have gathered before decays. Meanwhile `steps`.
    void softmax(float *scores, int64_t num_rows, float scale, GrowingSums &sums, int64_t first_row, Steps &steps) const {
        alignas(64) float decay[PAIR_ROWS], origin[PAIR_ROWS];
        // Looking for maxima takes about a fourth of the time, powers the rest.
        const int64_t num_steps = steps.num_left();
        const int num_vecs = num_padded_;
        for (int64_t first = 0; first < num_rows; first += WIDTH) {
            const int64_t count = std::min<int64_t>(WIDTH, num_rows - first);
            const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
            Vec highest[WIDTH];
            std::fill_n(highest, WIDTH, splat(MINUS_INFINITY));
            for (int64_t r = 0; r < count; ++r) {
                const float *const row = scores + (first + r) * TILE_KEYS;
                highest[r] = load(row);
                for (int i = 1; i < num_vecs; ++i) highest[r] = max(highest[r], load(row + i * WIDTH));
            }
            float *const kept = sums.max + first_row + first;
            const Vec seen = _mm512_mask_loadu_ps(splat(MINUS_INFINITY), mask, kept);
            const Vec new_max = max(max_of_each(highest) * splat(scale), seen);
            const Vec finite = _mm512_mask_mov_ps(
                new_max, _mm512_cmp_ps_mask(new_max, splat(MINUS_INFINITY), _CMP_EQ_OQ), splat(0.0f)
            );
            store(decay + first, exp2_of_nonpositive(seen - finite));
            store(origin + first, splat(0.0f) - finite);
            _mm512_mask_storeu_ps(kept, mask, new_max);
            steps.run(num_steps * WIDTH / (4 * num_rows));
        }
        const int64_t num_kept = steps.num_left();
        const Vec factor = splat(scale);
        for (int64_t r = 0; r < num_rows; ++r) {
            float *const row = scores + r * TILE_KEYS;
            uint16_t *const weights = reinterpret_cast<uint16_t *>(row);  // behind what has been read
            const Vec down = splat(origin[r]);
            Vec sum = splat(0.0f);
            for (int i = 0; i < num_vecs; i += 2) {
                const Vec one = weight_of(fma(load(row + i * WIDTH), factor, down));
                const Vec two = weight_of(fma(load(row + (i + 1) * WIDTH), factor, down));
                store_two(weights + i * WIDTH, one, two);
                sum = sum + one + two;
            }
            float *const lanes = sums.lanes + (first_row + r) * WIDTH, *const values = sums.values + (first_row + r) * dim_;
            store(lanes, fma(load(lanes), splat(decay[r]), sum));
            if (decay[r] != 1.0f)
                for (int64_t d = 0; d < dim_; d += WIDTH) store(values + d, load(values + d) * splat(decay[r]));
            steps.run(num_kept * (r + 1) / num_rows - num_kept * r / num_rows);
        }
    }

  private:
    static bool is_full(const KeyGroup<uint16_t> &group) { return group.first_lane == 0 && group.end_lane == GROUP; }

    // 2^x for x <= 0 and for -inf; relative error below 4e-6, a five-hundredth of what rounding to bf16 adds. NaN of NaN; needs
    // flush-to-zero. 2^floor(x) times a polynomial of the rest with constant term 1, of least largest relative error.
    static Vec weight_of(Vec x) {
        const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        Vec y = fma(splat(1.3427380e-2f), f, splat(5.2241072e-2f));
        y = fma(y, f, splat(2.4128109e-1f));
        y = fma(y, f, splat(6.9304468e-1f));
        y = fma(y, f, splat(1.0f));
        return _mm512_scalef_ps(y, x);
    }

    // The maximum of each of 16 vectors.
    static Vec max_of_each(const Vec x[WIDTH]) {
        Vec halves[8], quarters[4], pairs[2];
        for (int i = 0; i < 8; ++i)
            halves[i] = max(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
        for (int i = 0; i < 4; ++i)
            quarters[i] = max(
                _mm512_shuffle_f32x4(halves[i], halves[i + 4], 0x88), _mm512_shuffle_f32x4(halves[i], halves[i + 4], 0xdd)
            );
        for (int i = 0; i < 2; ++i)
            pairs[i] = max(
                _mm512_unpacklo_ps(quarters[i], quarters[i + 2]), _mm512_unpackhi_ps(quarters[i], quarters[i + 2])
            );
        const Vec all = max(_mm512_unpacklo_ps(pairs[0], pairs[1]), _mm512_unpackhi_ps(pairs[0], pairs[1]));
        return _mm512_shuffle_f32x4(all, all, 0xd8);  // rows 0 to 3, 8 to 11, 4 to 7, 12 to 15 until then
    }

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

    // TILE_DEPTH dimensions from d on of 32 rows by 2 groups.
    void score_pairs(const uint16_t *queries, float *scores, int64_t d, int g, bool is_last) const {
        const int64_t depth = padded_depth(dim_);
        if (d == 0) {
            zero_tile<0>();
            zero_tile<1>();
            zero_tile<2>();
            zero_tile<3>();
        }
        load_tile<4>(queries + d, depth * 2);
        load_tile<6>(keys_at(g, d), GROUP * 4);
        multiply_tiles<0, 4, 6>();
        load_tile<7>(keys_at(g + 1, d), GROUP * 4);
        multiply_tiles<1, 4, 7>();
        load_tile<5>(queries + TILE_ROWS * depth + d, depth * 2);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
        if (!is_last) return;
        scores += g * GROUP;
        store_tile<0>(scores, TILE_KEYS * 4);
        store_tile<1>(scores + GROUP, TILE_KEYS * 4);
        store_tile<2>(scores + TILE_ROWS * TILE_KEYS, TILE_KEYS * 4);
        store_tile<3>(scores + TILE_ROWS * TILE_KEYS + GROUP, TILE_KEYS * 4);
    }

    // The same of at most 16 rows by 4 groups.
    void score_rows(const uint16_t *queries, float *scores, int64_t d, int g, bool is_last) const {
        if (d == 0) {
            zero_tile<0>();
            zero_tile<1>();
            zero_tile<2>();
            zero_tile<3>();
        }
        load_tile<4>(queries + d, padded_depth(dim_) * 2);
        load_tile<6>(keys_at(g, d), GROUP * 4);
        multiply_tiles<0, 4, 6>();
        load_tile<7>(keys_at(g + 1, d), GROUP * 4);
        multiply_tiles<1, 4, 7>();
        load_tile<6>(keys_at(g + 2, d), GROUP * 4);
        multiply_tiles<2, 4, 6>();
        load_tile<7>(keys_at(g + 3, d), GROUP * 4);
        multiply_tiles<3, 4, 7>();
        if (!is_last) return;
        scores += g * GROUP;
        store_tile<0>(scores, TILE_KEYS * 4);
        store_tile<1>(scores + GROUP, TILE_KEYS * 4);
        store_tile<2>(scores + 2 * GROUP, TILE_KEYS * 4);
        store_tile<3>(scores + 3 * GROUP, TILE_KEYS * 4);
    }

    // 2 groups' share in 32 rows by 32 dimensions from d on, or by the last 16.
    void add_pairs(const uint16_t *weights, float *values, int64_t d, int g, bool is_last) const {
        const bool is_pair = d + GROUP < dim_;
        float *const few = values + d, *const more = few + TILE_ROWS * dim_;
        if (g == 0) {
            load_tile<0>(few, dim_ * 4);
            load_tile<2>(more, dim_ * 4);
            if (is_pair) {
                load_tile<1>(few + GROUP, dim_ * 4);
                load_tile<3>(more + GROUP, dim_ * 4);
            }
        }
        load_tile<4>(weights + g * GROUP, TILE_KEYS * 4);
        load_tile<6>(values_[g / 2] + 2 * d, dim_ * 4);
        multiply_tiles<0, 4, 6>();
        load_tile<5>(weights + 2 * TILE_ROWS * TILE_KEYS + g * GROUP, TILE_KEYS * 4);
        multiply_tiles<2, 5, 6>();
        if (is_pair) {
            load_tile<7>(values_[g / 2] + 2 * (d + GROUP), dim_ * 4);
            multiply_tiles<1, 4, 7>();
            multiply_tiles<3, 5, 7>();
        }
        if (!is_last) return;
        store_tile<0>(few, dim_ * 4);
        store_tile<2>(more, dim_ * 4);
        if (is_pair) {
            store_tile<1>(few + GROUP, dim_ * 4);
            store_tile<3>(more + GROUP, dim_ * 4);
        }
    }

    // The same for at most 16 rows.
    void add_rows(const uint16_t *weights, float *values, int64_t d, int g, bool is_last) const {
        const bool is_pair = d + GROUP < dim_;
        values += d;
        if (g == 0) {
            load_tile<0>(values, dim_ * 4);
            if (is_pair) load_tile<1>(values + GROUP, dim_ * 4);
        }
        load_tile<4>(weights + g * GROUP, TILE_KEYS * 4);
        load_tile<6>(values_[g / 2] + 2 * d, dim_ * 4);
        multiply_tiles<0, 4, 6>();
        if (is_pair) {
            load_tile<7>(values_[g / 2] + 2 * (d + GROUP), dim_ * 4);
            multiply_tiles<1, 4, 7>();
        }
        if (!is_last) return;
        store_tile<0>(values, dim_ * 4);
        if (is_pair) store_tile<1>(values + GROUP, dim_ * 4);
    }

    const KeyGroup<uint16_t> *groups_;
    const int num_groups_, num_padded_;
    const int64_t dim_;
    float *const scores_;  // [2][32][TILE_KEYS]
    const uint16_t *keys_[TILE_GROUPS], *last_keys_[TILE_GROUPS], *values_[TILE_GROUPS / 2];
};

#endif
