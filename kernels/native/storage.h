// The two storage types, fp32 and bf16 (as uint16_t): conversion, and the place of a number in a group.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void from_float(float x, float *to) { *to = x; }
inline void from_float(float x, uint16_t *to) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // To the nearest, ties to even; NaN stays NaN.
    *to = static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Where dimension d of a token lies in its group, as layout.h says.
template <class T>
struct Place;
template <>
struct Place<float> {
    static int64_t key(int64_t lane, int64_t d, int64_t) { return d * GROUP + lane; }
    static int64_t value(int64_t lane, int64_t d, int64_t dim) { return lane * dim + d; }
};
template <>
struct Place<uint16_t> {
    static int64_t key(int64_t lane, int64_t d, int64_t) { return d / 2 * 2 * GROUP + 2 * lane + d % 2; }
    static int64_t value(int64_t lane, int64_t d, int64_t dim) { return lane / 2 * 2 * dim + 2 * d + lane % 2; }
};
