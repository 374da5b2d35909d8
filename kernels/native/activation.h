// Activations of MLPs, by vectors: fp32, powers of e by exp2_of_nonpositive (so none overflows).
#pragma once

#include <cstdint>

#include "calls.h"
#include "rows.h"
#include "simd.h"

constexpr float LOG2_E = 1.44269504088896340736f;

// In the order of _KINDS in native_pointwise.py.
enum ActivationKind : int64_t { SILU, GELU, GELU_TANH, QUICK_GELU, SQUARED_RELU, RELU, SIGMOID, NUM_ACTIVATIONS };

// NaN of NaN in x, whatever the limit.
inline Vec at_most(Vec x, Vec limit) { return splat(0.0f) - max(splat(0.0f) - limit, splat(0.0f) - x); }
inline Vec at_least(Vec x, Vec limit) { return max(limit, x); }

inline Vec times_sigmoid(Vec x, Vec y) {
    // x / (1 + e^-y), as x e^min(y, 0) / (1 + e^-|y|): neither power of e overflows.
    const Vec negative = splat(0.0f) - max(y, splat(0.0f) - y);
    const Vec at_most_0 = splat(0.0f) - max(splat(0.0f) - y, splat(0.0f));
    const Vec denominator = splat(1.0f) + exp2_of_nonpositive(negative * splat(LOG2_E));
    return x * exp2_of_nonpositive(at_most_0 * splat(LOG2_E)) / denominator;
}

inline Vec silu(Vec x) { return times_sigmoid(x, x); }

// x times the normal distribution's integral up to x, that is max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2.
inline Vec gelu(Vec x) {
    const Vec size = at_most(max(x, splat(0.0f) - x), splat(100.0f)), z = size * splat(0.70710678f);
    const Vec t = splat(1.0f) / fma(z, splat(0.5f), splat(1.0f));
    // erfc(z) = t e^(p(t) - z^2) within 1.2e-7 of itself: W. H. Press et al., Numerical Recipes, erfcc.
    Vec p = splat(0.17087277f);
    p = fma(p, t, splat(-0.82215223f));
    p = fma(p, t, splat(1.48851587f));
    p = fma(p, t, splat(-1.13520398f));
    p = fma(p, t, splat(0.27886807f));
    p = fma(p, t, splat(-0.18628806f));
    p = fma(p, t, splat(0.09678418f));
    p = fma(p, t, splat(0.37409196f));
    p = fma(p, t, splat(1.00002368f));
    p = fma(p, t, splat(-1.26551223f));
    const Vec power = exp2_of_nonpositive(fma(z, splat(0.0f) - z, p) * splat(LOG2_E));
    return fma(size, splat(-0.5f) * t * power, max(splat(0.0f), x));
}

template <int64_t K>
inline Vec activated(Vec x) {
    switch (K) {
        case SILU: return silu(x);
        case GELU: return gelu(x);
        case GELU_TANH: return times_sigmoid(x, splat(1.5957691216f) * fma(splat(0.044715f) * x * x, x, x));
        case QUICK_GELU: return times_sigmoid(x, splat(1.702f) * x);
        case SQUARED_RELU: return max(splat(0.0f), x) * max(splat(0.0f), x);
        case RELU: return max(splat(0.0f), x);
        default: return times_sigmoid(splat(1.0f), x);
    }
}

// out [width] of in [width], or [2 width] with a gate: activated(first half) * (second half + offset).
template <int64_t K, class T>
inline void activate_row_of(const Activation &activation, const T *in, int64_t width, T *out) {
    const Vec most = splat(activation.clamp), least = splat(-activation.clamp);
    for (int64_t i = 0; i < width; i += WIDTH) {
        Vec x = load_first(in + i, width - i);
        if (activation.has_gate) {
            Vec up = load_first(in + width + i, width - i);
            if (activation.clamp != 0.0f) {
                x = at_most(x, most);
                up = at_least(at_most(up, most), least);
            }
            if (activation.gate_offset != 0.0f) up = up + splat(activation.gate_offset);
            x = activated<K>(x) * up;
        } else {
            x = activated<K>(x);
        }
        store_first(out + i, x, width - i);
    }
}

template <class T>
inline void activate_row(const Activation &activation, const T *in, int64_t width, T *out) {
    static_assert(NUM_ACTIVATIONS == 7, "each has its case");
    switch (activation.kind) {
        case SILU: return activate_row_of<SILU>(activation, in, width, out);
        case GELU: return activate_row_of<GELU>(activation, in, width, out);
        case GELU_TANH: return activate_row_of<GELU_TANH>(activation, in, width, out);
        case QUICK_GELU: return activate_row_of<QUICK_GELU>(activation, in, width, out);
        case SQUARED_RELU: return activate_row_of<SQUARED_RELU>(activation, in, width, out);
        case RELU: return activate_row_of<RELU>(activation, in, width, out);
        default: return activate_row_of<SIGMOID>(activation, in, width, out);
    }
}

// silu(gate) * up, which products of tiles have built in.
inline bool is_plain_swiglu(const Activation &activation) {
    return activation.kind == SILU && activation.has_gate && activation.clamp == 0.0f && activation.gate_offset == 0.0f;
}
