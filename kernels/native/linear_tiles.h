// Linear layers by products of matrix tiles (matrix_tiles.h), for prompts and decodes alike.
//
// Weights lie as linear.cpp says: a tile of 32 inputs and 16 outputs is 16 runs of 64 bytes in 4 KiB. An output is the
// sum over tiles of inputs in ascending order (of each slice, slices.h), so its bits do not depend on which rows stand
// beside it.
#pragma once

#include "matrix_tiles.h"

#if defined(HAS_MATRIX_TILES)

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "calls.h"
#include "linear_output.h"
#include "padded_rows.h"
#include "prefetcher.h"
#include "slices.h"
#include "storage.h"
#include "sums.h"

template <class W>
class TiledLinear : public PaddedRows {
  public:
    explicit TiledLinear(const LinearCall &call)
        : PaddedRows(call), num_packs_((call.num_outputs + PACKED - 1) / PACKED / (call.is_gated ? 2 : 1)) {}

    static constexpr int64_t MIN_PARALLEL_WORK = 1 << 19;  // some 50 us of reading: what waking a thread takes

    // Reading a weight takes as long as multiplying it by some 64 rows.
    int64_t work() const {
        return call_.num_rows == 0 ? 0 : slices_.size() * call_.num_outputs * (1 + call_.num_rows / 64);
    }

    // Cuts the products into items for so many threads; returns how many.
    int64_t cut(int64_t num_threads) {
        num_threads_ = num_threads;
        // Several packs an item for few rows: a run of memory that the processor's prefetching follows.
        if (call_.num_rows <= TILE_ROWS) return num_items_ = call_.num_rows == 0 ? 0 : std::min(num_packs_, 4 * num_threads);
        num_pairs_ = (call_.num_rows + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
        const int64_t max_pairs = std::max<int64_t>(1, MAX_INPUT_BYTES / (2 * TILE_ROWS * depth_ * 2));
        const int64_t least_blocks = (num_pairs_ + max_pairs - 1) / max_pairs;
        // With few outputs there are more threads than packs.
        const int64_t wanted_blocks = (2 * num_threads + num_packs_ - 1) / num_packs_;
        num_blocks_ = std::min(num_pairs_, num_threads > 1 ? std::max(least_blocks, wanted_blocks) : least_blocks);
        return num_items_ = num_packs_ * num_blocks_;
    }

    void run(int64_t i) const {
        if (call_.num_rows <= TILE_ROWS) {
            const TileScope tiles(call_.num_rows, call_.num_rows);
            for (int64_t p = num_packs_ * i / num_items_; p < num_packs_ * (i + 1) / num_items_; ++p) multiply_few(p);
            return;
        }
        const int64_t block = i / num_packs_, pack = i % num_packs_;
        // The item that this thread takes next, if all take as long.
        const int64_t next = std::min(pack + num_threads_, num_packs_);
        multiply_many(pack, num_pairs_ * block / num_blocks_, num_pairs_ * (block + 1) / num_blocks_, next);
    }

  private:
    static constexpr int64_t MAX_INPUT_BYTES = 1 << 20;       // of the rows of an item, which stay in L2
    static constexpr int64_t AHEAD = 8192;                    // bytes: what decodes fetch beforehand
    static constexpr int64_t PACK_STRIDE = PACKED * 2 * 2;    // bytes between pairs of inputs

    const W *pack_of(int64_t pack) const {
        return advance(static_cast<const W *>(call_.weight.values), (pack * depth_ + slices_.first()) * PACKED);
    }

    // All of at most 16 rows by one pack (and the one it gates), which is read once, as it comes from memory.
    void multiply_few(int64_t pack) const {
        alignas(64) float sums[2][TILE_ROWS * PACKED], tree[MAX_TREE_DEPTH * TILE_ROWS * PACKED];
        const auto fetch = [](const W *at) {
            for (int64_t i = 0; i < bytes_of<W>(TILE_DEPTH * PACKED); i += 64)
                __builtin_prefetch(reinterpret_cast<const char *>(at) + AHEAD + i);
        };
        const auto multiply = [&](const W *weights, float *all) {
            add_up_slices(0, slices_.num_slices, all, call_.num_rows * PACKED, tree, [&](int64_t slice, float *to) {
                const int64_t d = slice * slices_.depth;
                multiply_row_tile(advance(weights, d * PACKED), row(0) + d, to, fetch);
            });
        };
        multiply(pack_of(pack), sums[0]);
        if (call_.is_gated) multiply(pack_of(num_packs_ + pack), sums[1]);
        write_rows(pack, 0, call_.num_rows, sums[0], sums[1]);
    }

    void write_rows(int64_t pack, int64_t first_row, int64_t num_rows, const float *sums, const float *gated) const {
        for (int64_t r = 0; r < num_rows; ++r)
            if (call_.is_gated)
                write_gated(call_, first_row + r, pack * PACKED, sums + r * PACKED, gated + r * PACKED);
            else
                write_outputs(call_, first_row + r, pack * PACKED, PACKED, sums + r * PACKED);
    }

    // One tile of rows by 64 outputs, over one slice. fetch(weights): what to do beside the products over 32 inputs.
    template <class Weight, class Fetch>
    void multiply_row_tile(const Weight *weights, const uint16_t *rows, float *sums, const Fetch &fetch) const {
        alignas(64) uint16_t widened[IS_BF16<Weight> ? 1 : 2 * TILE_DEPTH * PACKED];
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        // Narrow weights: a step ahead, in two places by turns, as tiles are loaded late after their numbers were written.
        const auto place = [&](int64_t d) { return widened + d / TILE_DEPTH % 2 * TILE_DEPTH * PACKED; };
        if constexpr (!IS_BF16<Weight>) widen_pairs(weights, TILE_DEPTH, place(0));
        for (int64_t d = 0; d < slices_.depth; d += TILE_DEPTH) {
            const Weight *const at = advance(weights, d * PACKED);
            const uint16_t *tile;
            if constexpr (IS_BF16<Weight>) {
                tile = at;
            } else {
                if (d + TILE_DEPTH < slices_.depth)
                    widen_pairs(advance(at, TILE_DEPTH * PACKED), TILE_DEPTH, place(d + TILE_DEPTH));
                tile = place(d);
            }
            fetch(at);
            load_tile<4>(rows + d, depth_ * 2);
            load_tile<6>(tile, PACK_STRIDE);
            multiply_tiles<0, 4, 6>();
            load_tile<7>(tile + 2 * TILE_ROWS, PACK_STRIDE);
            multiply_tiles<1, 4, 7>();
            load_tile<6>(tile + 4 * TILE_ROWS, PACK_STRIDE);
            multiply_tiles<2, 4, 6>();
            load_tile<7>(tile + 6 * TILE_ROWS, PACK_STRIDE);
            multiply_tiles<3, 4, 7>();
        }
        store_tile<0>(sums, PACKED * 4);
        store_tile<1>(sums + TILE_ROWS, PACKED * 4);
        store_tile<2>(sums + 2 * TILE_ROWS, PACKED * 4);
        store_tile<3>(sums + 3 * TILE_ROWS, PACKED * 4);
    }

    // Two tiles of rows by 32 outputs, over one slice.
    void multiply_two_row_tiles(const uint16_t *weights, const uint16_t *rows, float *sums, Prefetcher &next) const {
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        for (int64_t d = 0; d < slices_.depth; d += TILE_DEPTH) {
            const uint16_t *const tile = weights + d * PACKED;
            load_tile<4>(rows + d, depth_ * 2);
            load_tile<6>(tile, PACK_STRIDE);
            multiply_tiles<0, 4, 6>();
            load_tile<7>(tile + 2 * TILE_ROWS, PACK_STRIDE);
            multiply_tiles<1, 4, 7>();
            load_tile<5>(rows + TILE_ROWS * depth_ + d, depth_ * 2);
            multiply_tiles<2, 5, 6>();
            multiply_tiles<3, 5, 7>();
            next.fetch();
        }
        store_tile<0>(sums, PACKED * 4);
        store_tile<1>(sums + TILE_ROWS, PACKED * 4);
        store_tile<2>(sums + TILE_ROWS * PACKED, PACKED * 4);
        store_tile<3>(sums + TILE_ROWS * PACKED + TILE_ROWS, PACKED * 4);
    }

    // Pairs of row tiles [first_pair, end_pair) by one pack (and the one it gates). next: the pack that is probably
    // multiplied next.
    void multiply_many(int64_t pack, int64_t first_pair, int64_t end_pair, int64_t next) const {
        const uint16_t *weights[2] = {};
        const int num_halves = call_.is_gated ? 2 : 1;
        static thread_local Buffer memory;
        const int64_t depth = slices_.size();
        for (int h = 0; h < num_halves; ++h) {
            const W *const from = pack_of(h * num_packs_ + pack);
            if constexpr (IS_BF16<W>) {
                weights[h] = from;
            } else {
                uint16_t *const widened = memory.at_least<uint16_t>(num_halves * depth * PACKED) + h * depth * PACKED;
                widen_pairs(from, depth, widened);
                weights[h] = widened;
            }
        }
        // Of gated packs the first half only: the other one begins to be read long after.
        const int64_t next_bytes = next < num_packs_ ? bytes_of<W>(depth * PACKED) : 0;
        Prefetcher fetch(pack_of(next), next_bytes, (end_pair - first_pair) * num_halves * 2 * depth / TILE_DEPTH);
        const int64_t last_rows = (call_.num_rows - 1) % (2 * TILE_ROWS) + 1;
        const bool has_last = end_pair * 2 * TILE_ROWS >= call_.num_rows && last_rows < 2 * TILE_ROWS;
        {
            const TileScope tiles(TILE_ROWS, TILE_ROWS);
            for (int64_t p = first_pair; p < end_pair - has_last; ++p) multiply_pair(pack, weights, p, 2 * TILE_ROWS, fetch);
        }
        if (!has_last) return;
        const TileScope tiles(
            std::min(last_rows, TILE_ROWS), last_rows > TILE_ROWS ? last_rows - TILE_ROWS : last_rows
        );
        multiply_pair(pack, weights, end_pair - 1, last_rows, fetch);
    }

    void multiply_pair(
        int64_t pack, const uint16_t *const *weights, int64_t pair, int64_t num_rows, Prefetcher &fetch
    ) const {
        constexpr int64_t SIZE = 2 * TILE_ROWS * PACKED;
        alignas(64) float sums[2][SIZE], tree[MAX_TREE_DEPTH * SIZE];
        const int64_t first_row = pair * 2 * TILE_ROWS;
        for (int h = 0; h < 2 && weights[h] != nullptr; ++h)
            add_up_slices(0, slices_.num_slices, sums[h], SIZE, tree, [&](int64_t slice, float *to) {
                const int64_t d = slice * slices_.depth;
                const uint16_t *const of_slice = weights[h] + d * PACKED, *const rows = row(first_row) + d;
                if (num_rows > TILE_ROWS) {
                    multiply_two_row_tiles(of_slice, rows, to, fetch);
                    multiply_two_row_tiles(of_slice + 4 * TILE_ROWS, rows, to + 2 * TILE_ROWS, fetch);
                } else {
                    multiply_row_tile(of_slice, rows, to, [&](const uint16_t *) { fetch.fetch(); });
                }
            });
        write_rows(pack, first_row, num_rows, sums[0], sums[1]);
    }

    const int64_t num_packs_;
    int64_t num_threads_ = 1, num_items_ = 0, num_pairs_ = 0, num_blocks_ = 0;
};

#endif
