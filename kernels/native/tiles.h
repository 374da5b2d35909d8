// The two products of attention over one tile of keys, in register tiles; fp32 arithmetic whatever the storage.
//
// Every row is computed in the same order of operations whatever rows stand beside it, whether its keys are read as
// fp32, as bf16, or as bf16 widened beforehand. So a token's output does not depend on its batch.
#pragma once

#include "layout.h"
#include "simd.h"

constexpr int MAX_ROWS = 6;  // of a register tile
constexpr int VECS_PER_GROUP = static_cast<int>(GROUP) / WIDTH;
constexpr int PANEL_GROUPS = MAX_COLUMNS / VECS_PER_GROUP;
constexpr int TILE_GROUPS = 8;
constexpr int TILE_KEYS = TILE_GROUPS * static_cast<int>(GROUP);
static_assert(TILE_GROUPS % PANEL_GROUPS == 0, "a tile is whole panels");

// Decodes wait for memory: they fetch ahead, in ascending order of address, which the processor's own prefetching
// then follows, and which the products over several groups at once do not have. As if the next groups lay behind
// these, mostly true; a fetch of something else is harmless. bf16 decode at 128K, one thread: 6.8 -> 9.1 GB/s.
template <int R>
constexpr bool IS_BOUND_BY_MEMORY = R <= 4;
constexpr int64_t AHEAD = 4 * GROUP;  // tokens, for values; keys are fetched one panel ahead

// A group of a tile; keys [first_lane, end_lane) of it belong to the sequence.
template <class T>
struct KeyGroup {
    const T *k, *v;
    int64_t first_key;  // of first_lane
    int first_lane, end_lane;
};

// Vectors that one load gives: of an fp32 group one; of a bf16 group an even and an odd one, interleaved in memory.
template <class T>
constexpr int STEP = sizeof(T) == 2 ? 2 : 1;
static inline void load_step(const float *p, Vec to[1]) { to[0] = load(p); }
static inline void load_step(const uint16_t *p, Vec to[2]) { load_pairs(p, to[0], to[1]); }

// q [dim][R], already scaled -> scores [R] rows of TILE_KEYS floats, one panel of groups wide.
template <class T, int R>
static void score_panel(const KeyGroup<T> *groups, const float *q, int64_t dim, float *scores) {
    Vec sum[R][MAX_COLUMNS] = {};
    for (int64_t d = 0; d < dim; d += STEP<T>) {
        Vec keys[MAX_COLUMNS][STEP<T>];
        for (int c = 0; c < MAX_COLUMNS; ++c)
            load_step(
                groups[c / VECS_PER_GROUP].k + d * GROUP + (c % VECS_PER_GROUP) * STEP<T> * WIDTH, keys[c]
            );
        if constexpr (IS_BOUND_BY_MEMORY<R>)
            for (int c = 0; c < PANEL_GROUPS; ++c)
                __builtin_prefetch(groups[0].k + (PANEL_GROUPS * (dim + d) + STEP<T> * c) * GROUP);
#pragma GCC unroll 2
        for (int s = 0; s < STEP<T>; ++s)
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const Vec query = splat(q[(d + s) * R + r]);
                for (int c = 0; c < MAX_COLUMNS; ++c) sum[r][c] = fma(query, keys[c][s], sum[r][c]);
            }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < MAX_COLUMNS; ++c) store(scores + r * TILE_KEYS + c * WIDTH, sum[r][c]);
}

// out [R][dim] = decay [R] * out + weights [R][TILE_KEYS] . values, C vectors of dimensions wide.
template <class T, int R, int C>
static void add_values(
    const KeyGroup<T> *groups, int num_groups, const float *weights, const float *decay, float *out, int64_t dim,
    int64_t first_dim
) {
    Vec sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = load(out + r * dim + c * WIDTH) * splat(decay[r]);
    for (int g = 0; g < num_groups; ++g) {
        const T *v = groups[g].v + STEP<T> * first_dim;
        for (int lane = groups[g].first_lane / STEP<T> * STEP<T>; lane < groups[g].end_lane; lane += STEP<T>) {
            Vec values[C][STEP<T>];
            for (int c = 0; c < C; ++c) load_step(v + lane * dim + c * STEP<T> * WIDTH, values[c]);
            if constexpr (IS_BOUND_BY_MEMORY<R>)
                for (int c = 0; c < C; ++c) __builtin_prefetch(v + (AHEAD + lane) * dim + c * STEP<T> * WIDTH);
#pragma GCC unroll 2
            for (int s = 0; s < STEP<T>; ++s) {
                // A lane of another sequence, or of none, may hold anything: it must not even be multiplied by 0.
                if (STEP<T> > 1 && (lane + s < groups[g].first_lane || lane + s >= groups[g].end_lane)) continue;
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) {
                    const Vec weight = splat(weights[r * TILE_KEYS + g * GROUP + lane + s]);
                    for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, values[c][s], sum[r][c]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * dim + c * WIDTH, sum[r][c]);
}

template <class T>
using ScorePanel = void (*)(const KeyGroup<T> *, const float *, int64_t, float *);
template <class T>
using AddValues = void (*)(const KeyGroup<T> *, int, const float *, const float *, float *, int64_t, int64_t);

template <class T>
static ScorePanel<T> score_panel_of(int num_rows) {
    static constexpr ScorePanel<T> all[] = {score_panel<T, 1>, score_panel<T, 2>, score_panel<T, 3>,
                                            score_panel<T, 4>, score_panel<T, 5>, score_panel<T, 6>};
    return all[num_rows - 1];
}

template <class T, int C = MAX_COLUMNS>
static AddValues<T> add_values_of(int num_rows, int num_columns) {
    if constexpr (C > 1)
        if (num_columns < C) return add_values_of<T, C - 1>(num_rows, num_columns);
    static constexpr AddValues<T> all[] = {add_values<T, 1, C>, add_values<T, 2, C>, add_values<T, 3, C>,
                                           add_values<T, 4, C>, add_values<T, 5, C>, add_values<T, 6, C>};
    return all[num_rows - 1];
}

// A group's keys and values as fp32 of the same layout; worth it when several register tiles read them.
static inline void widen_group(const KeyGroup<uint16_t> &from, float *k, float *v, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 2)
        for (int c = 0; c < VECS_PER_GROUP; ++c) {
            Vec even, odd;
            load_pairs(from.k + d * GROUP + c * 2 * WIDTH, even, odd);
            store(k + d * GROUP + c * WIDTH, even);
            store(k + (d + 1) * GROUP + c * WIDTH, odd);
        }
    for (int64_t pair = 0; pair < GROUP / 2; ++pair)
        for (int64_t d = 0; d < dim; d += WIDTH) {
            Vec even, odd;
            load_pairs(from.v + pair * 2 * dim + 2 * d, even, odd);
            store(v + 2 * pair * dim + d, even);
            store(v + (2 * pair + 1) * dim + d, odd);
        }
}
