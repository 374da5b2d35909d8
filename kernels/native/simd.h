// Vectors of floats as wide as the instruction set this file is compiled for: AVX-512 or AVX2.
// The includer's arithmetic is the same in both, so only these few operations differ.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512DQ__)

using Vec = __m512;
constexpr int WIDTH = 16;
constexpr int MAX_COLUMNS = 4;  // of a register tile; 6 rows x 4 columns + operands fill the 32 registers

static inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, Vec x) { _mm512_storeu_ps(p, x); }
static inline Vec splat(float x) { return _mm512_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }
static inline float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
static inline float first_lane(Vec x) { return _mm512_cvtss_f32(x); }

// Two bf16 vectors interleaved element by element: the first is in the low halves of 32-bit words.
static inline void load_pairs(const uint16_t *p, Vec &first, Vec &second) {
    const __m512i words = _mm512_loadu_si512(p);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// WIDTH bf16 numbers.
static inline Vec load(const uint16_t *p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// Rounded as from_float does it: to the nearest, ties to even; NaN stays NaN.
static inline void store(uint16_t *p, Vec x) {
#if defined(__AVX512BF16__)
    const __m256bh words = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &words, sizeof words);
#else
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, _mm512_set1_epi32(1)));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i sound = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(sound));
#endif
}

// The same number after rounding.
static inline Vec rounded(Vec x) {
#if defined(__AVX512BF16__)
    const __m256bh words = _mm512_cvtneps_pbh(x);
    __m256i bits;
    std::memcpy(&bits, &words, sizeof bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
    uint16_t words[WIDTH];
    store(words, x);
    return load(words);
#endif
}

// Two vectors, one behind the other, rounded likewise.
static inline void store_two(uint16_t *p, Vec first, Vec second) {
#if defined(__AVX512BF16__)
    const __m512bh words = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(p, &words, sizeof words);
#else
    store(p, first);
    store(p + WIDTH, second);
#endif
}

// The reverse of load_pairs, for numbers that are bf16 already.
static inline void store_pairs(uint16_t *p, Vec first, Vec second) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(second)));
}

static inline Vec load_bytes(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}

// WIDTH bytes of two numbers each, 0 to 15 for -8 to 7: those in the low halves, and the others.
static inline void load_halves(const uint8_t *p, Vec &low, Vec &high) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m512i eight = _mm512_set1_epi32(8);
    low = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), eight));
    high = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(bytes, 4), eight));
}

static inline Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// x * 2^n for integer n >= -200; below 2^-126 the result is 0, given flush-to-zero.
static inline Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

#elif defined(__AVX2__) && defined(__FMA__)

using Vec = __m256;
constexpr int WIDTH = 8;
constexpr int MAX_COLUMNS = 2;  // 6 rows x 2 columns + operands fill the 16 registers

static inline Vec load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store(float *p, Vec x) { _mm256_storeu_ps(p, x); }
static inline Vec splat(float x) { return _mm256_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline float first_lane(Vec x) { return _mm256_cvtss_f32(x); }

static inline float reduce_max(Vec x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

static inline float reduce_add(Vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

static inline void load_pairs(const uint16_t *p, Vec &first, Vec &second) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    first = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    second = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

static inline Vec load(const uint16_t *p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

static inline void store(uint16_t *p, Vec x) {
    const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(high, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i sound = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    // Packing goes by halves of 128 bits: the wanted words are the first quarter and the third.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(sound, sound), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(words));
}

static inline Vec rounded(Vec x) {
    uint16_t words[WIDTH];
    store(words, x);
    return load(words);
}

static inline void store_two(uint16_t *p, Vec first, Vec second) {
    store(p, first);
    store(p + WIDTH, second);
}

static inline Vec load_bytes(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}

static inline void load_halves(const uint8_t *p, Vec &low, Vec &high) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
    const __m256i eight = _mm256_set1_epi32(8);
    low = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(15)), eight));
    high = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bytes, 4), eight));
}

static inline Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline Vec times_power_of_two(Vec x, Vec n) {
    // The exponent field is added to; where that would wrap, the result is 0.
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const Vec scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shift));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}

#else
#error "compiled for neither AVX-512 nor AVX2 with FMA"
#endif

// 2^x for x <= 0, and exactly 0 below -126. NaN of NaN. Relative error below 2e-7 (a test measures it). Needs flush-to-zero.
static inline Vec exp2_of_nonpositive(Vec x) {
    x = max(splat(-200.0f), x);  // in this order NaN stays NaN
    const Vec n = nearest(x);
    const Vec f = x - n;  // in [-0.5, 0.5]
    // Degree 5 with constant term 1, least largest relative error on the interval: 9.2e-8 before rounding.
    Vec y = splat(1.3264727e-3f);
    y = fma(y, f, splat(9.6715130e-3f));
    y = fma(y, f, splat(5.5507336e-2f));
    y = fma(y, f, splat(2.4022242e-1f));
    y = fma(y, f, splat(6.9314700e-1f));
    y = fma(y, f, splat(1.0f));
    return times_power_of_two(y, n);
}
