// The activation of gated MLPs.
#pragma once

#include "simd.h"

constexpr float LOG2_E = 1.44269504088896340736f;

inline Vec silu(Vec x) {
    // x / (1 + e^-x), as x e^min(x, 0) / (1 + e^-|x|): neither power of e overflows.
    const Vec negative = splat(0.0f) - max(x, splat(0.0f) - x);
    const Vec at_most_0 = splat(0.0f) - max(splat(0.0f) - x, splat(0.0f));
    const Vec denominator = splat(1.0f) + exp2_of_nonpositive(negative * splat(LOG2_E));
    return x * exp2_of_nonpositive(at_most_0 * splat(LOG2_E)) / denominator;
}
