// What every kernel of linear layers shares: how weights are packed, and how sums become outputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "calls.h"
#include "rows.h"
#include "simd.h"

constexpr int64_t PACKED = 64;  // outputs that lie together

// Inputs of a packed weight: zeros fill up what a matrix tile takes at once.
constexpr int64_t padded_inputs(int64_t num_inputs) { return (num_inputs + 31) / 32 * 32; }

// 32 inputs of 64 outputs in int4. Byte o of a pair holds output o's weights + 8 of two inputs, the first in the low half.
// A scale has 5 significant bits: times a weight of at most 3, that is a bf16 number, exactly.
struct Int4Group {
    static constexpr int64_t NUM_INPUTS = 32;
    uint16_t scales[PACKED];  // bf16
    uint8_t pairs[NUM_INPUTS / 2][PACKED];
};

// The slices that the inputs of a layer lie in, and which of them a call sums up.
struct SlicedInputs {
    explicit SlicedInputs(const LinearCall &call) {
        const int64_t num_all = std::max<int64_t>(1, call.weight.num_slices);
        num_inputs = call.num_inputs / num_all;
        depth = padded_inputs(num_inputs);
        whole_depth = num_all * depth;
        first_slice = call.only_slice > 0 ? call.only_slice - 1 : 0;
        num_slices = call.only_slice > 0 ? 1 : num_all;
    }
    int64_t first() const { return first_slice * depth; }  // padded inputs before those that are summed up
    int64_t size() const { return num_slices * depth; }    // and those that are

    int64_t num_inputs, depth, whole_depth;  // of a slice, the same with its padding, and of all slices
    int64_t first_slice, num_slices;         // that are summed up
};

// The type that weights are read in holds so many of them.
template <class W>
constexpr int64_t NUM_IN = 1;
template <>
constexpr int64_t NUM_IN<Int4Group> = Int4Group::NUM_INPUTS * PACKED;
template <class W>
inline const W *advance(const W *from, int64_t num_weights) {
    return from + num_weights / NUM_IN<W>;
}
template <class W>
constexpr int64_t bytes_of(int64_t num_weights) {
    return num_weights / NUM_IN<W> * static_cast<int64_t>(sizeof(W));
}
template <class W>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<uint16_t> = true;

// A vector of outputs' weights of two inputs.
struct Int4Place {
    const uint8_t *pairs;
    const uint16_t *scales;
};
inline Int4Place place(const Int4Group *pack, int64_t d, int64_t o) {
    const Int4Group &group = pack[d / Int4Group::NUM_INPUTS];
    return {group.pairs[d % Int4Group::NUM_INPUTS / 2] + o, group.scales + o};
}
inline void load_two(Int4Place at, Vec &first, Vec &second) {
    load_halves(at.pairs, first, second);
    const Vec scale = load(at.scales);
    first = first * scale;
    second = second * scale;
}

#if defined(__AVX512F__)
// int4 weights of two inputs as pairs of bf16, exactly: as for int8.
inline void widen_pairs(const Int4Group *from, int64_t depth, uint16_t *to) {
    for (int64_t d = 0; d < depth; d += Int4Group::NUM_INPUTS, ++from)
        for (int64_t o = 0; o < PACKED; o += WIDTH) {
            const Vec scale = load(from->scales + o);
            for (int64_t pair = 0; pair < Int4Group::NUM_INPUTS / 2; ++pair) {
                Vec first, second;
                load_halves(from->pairs[pair] + o, first, second);
                store_pairs(to + (d + 2 * pair) * PACKED + 2 * o, first * scale, second * scale);
            }
        }
}

// int8 weights of two inputs as pairs of bf16, exactly: one run of a tile for each 16 outputs.
inline void widen_pairs(const int8_t *from, int64_t depth, uint16_t *to) {
    for (int64_t d = 0; d < depth; d += 2)
        for (int64_t o = 0; o < PACKED; o += WIDTH)
            store_pairs(to + d * PACKED + 2 * o, load_bytes(from + d * PACKED + o), load_bytes(from + (d + 1) * PACKED + o));
}
#endif

// Sums of a row's outputs from `first` on, scaled and with their bias; `count` outputs are left.
inline Vec whole_sum(const LinearCall &call, const float *sums, int64_t first, int64_t count) {
    const Vec sum = load(sums);
    const bool has_scales = call.weight.scales != nullptr, has_bias = call.weight.bias != nullptr;
    if (!has_scales && !has_bias) return sum;
    if (!has_bias) return sum * load_first(call.weight.scales + first, count);
    const Vec bias = load_first(call.weight.bias + first, count);
    // Fused by us: the compiler would do it in some places and not in others.
    return has_scales ? fma(sum, load_first(call.weight.scales + first, count), bias) : sum + bias;
}

// Scale, bias, rounding and residual for `width` sums of a row, from output `first` on; those past the last are dropped.
inline void write_outputs(const LinearCall &call, int64_t row, int64_t first, int64_t width, const float *sums) {
    const int64_t count = std::min(width, call.num_outputs - first), at = row * call.num_outputs + first;
    uint16_t *const out = call.out + at;
    const auto finished = [&](int64_t o) {
        const Vec sum = whole_sum(call, sums + o, first + o, count - o);
        return call.residual == nullptr ? sum : load_first(call.residual + at + o, count - o) + rounded(sum);
    };
    int64_t o = 0;
    if (call.wide_out != nullptr) {
        for (; o < count; o += WIDTH) store_first(call.wide_out + at + o, whole_sum(call, sums + o, first + o, count - o), count - o);
        return;
    }
    for (; o + 2 * WIDTH <= count; o += 2 * WIDTH) store_two(out + o, finished(o), finished(o + WIDTH));
    for (; o < count; o += WIDTH) store_first(out + o, finished(o), count - o);
}

// The same for silu(gate) * up of PACKED outputs from `first` on, each half rounded before, as activate_row reads them.
inline void write_gated(const LinearCall &call, int64_t row, int64_t first, const float *gate, const float *up) {
    const int64_t half = call.num_outputs / 2;
    uint16_t *const out = call.out + row * half + first;
    const auto finished = [&](int64_t o) {
        const Vec open = rounded(whole_sum(call, gate + o, first + o, WIDTH));
        return silu(open) * rounded(whole_sum(call, up + o, half + first + o, WIDTH));
    };
    for (int64_t o = 0; o < PACKED; o += 2 * WIDTH) store_two(out + o, finished(o), finished(o + WIDTH));
}
