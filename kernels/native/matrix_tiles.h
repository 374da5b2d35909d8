// Products of bf16 tiles with fp32 sums, as the AMX instructions do them; in plain C++ where the build has none.
//
// A tile is 16 rows of 64 bytes. c [16][16] += a [16][32] . b [32][16], with b stored as pairs of inputs, [16][16][2].
// The order of operations is that of TDPBF16PS, and the plain version keeps it to the last bit: even inputs are summed
// from 0 by fused multiply-adds, odd ones likewise, then c + (even + odd). Denormal numbers count as 0.
#pragma once

#if defined(MEDHA_TILES) || defined(MEDHA_PLAIN_TILES)
#define HAS_MATRIX_TILES 1

#include <cmath>
#include <cstdint>
#include <cstring>

#include "storage.h"

constexpr int64_t TILE_ROWS = 16, TILE_DEPTH = 32;

constexpr int64_t rows_of_tile(int tile, int64_t rows, int64_t more_rows) {
    return tile >= 6 ? TILE_ROWS : tile == 2 || tile == 3 || tile == 5 ? more_rows : rows;
}

#if defined(MEDHA_TILES)

// While this lives, the thread has 8 tile registers: 0, 1 and 4 of `rows` rows, 2, 3 and 5 of `more_rows`, 6 and 7 of 16.
// Around every item of work, since other libraries of the process shape the registers as they need them; some 50 ns.
class TileScope {
  public:
    TileScope(int64_t rows, int64_t more_rows) {
        alignas(64) uint8_t shape[64] = {};
        shape[0] = 1;
        for (int t = 0; t < 8; ++t) {
            shape[16 + 2 * t] = 64;
            shape[48 + t] = static_cast<uint8_t>(rows_of_tile(t, rows, more_rows));
        }
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~TileScope() { asm volatile("tilerelease"); }
    TileScope(const TileScope &) = delete;
    TileScope &operator=(const TileScope &) = delete;
};

template <int T>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// stride: bytes between rows.
template <int T>
inline void load_tile(const void *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store_tile(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct PlainTile {
    int64_t num_rows = 0;
    alignas(64) uint8_t bytes[TILE_ROWS][64];
};
inline PlainTile &plain_tile(int index) {
    static thread_local PlainTile tiles[8];
    return tiles[index];
}

class TileScope {
  public:
    TileScope(int64_t rows, int64_t more_rows) {
        for (int t = 0; t < 8; ++t) plain_tile(t).num_rows = rows_of_tile(t, rows, more_rows);
    }
};

template <int T>
inline void zero_tile() {
    std::memset(plain_tile(T).bytes, 0, sizeof plain_tile(T).bytes);
}
template <int T>
inline void load_tile(const void *from, int64_t stride) {
    for (int64_t r = 0; r < plain_tile(T).num_rows; ++r)
        std::memcpy(plain_tile(T).bytes[r], static_cast<const char *>(from) + r * stride, 64);
}
template <int T>
inline void store_tile(void *to, int64_t stride) {
    for (int64_t r = 0; r < plain_tile(T).num_rows; ++r)
        std::memcpy(static_cast<char *>(to) + r * stride, plain_tile(T).bytes[r], 64);
}
template <int C, int A, int B>
inline void multiply_tiles() {
    uint16_t b[TILE_ROWS][TILE_DEPTH];
    std::memcpy(b, plain_tile(B).bytes, sizeof b);
    for (int64_t r = 0; r < plain_tile(A).num_rows; ++r) {
        uint16_t a[TILE_DEPTH];
        float c[TILE_ROWS], even[TILE_ROWS] = {}, odd[TILE_ROWS] = {};
        std::memcpy(a, plain_tile(A).bytes[r], sizeof a);
        std::memcpy(c, plain_tile(C).bytes[r], sizeof c);
        for (int64_t d = 0; d < TILE_ROWS; ++d)
            for (int64_t o = 0; o < TILE_ROWS; ++o) {
                even[o] = std::fma(to_float(a[2 * d]), to_float(b[d][2 * o]), even[o]);
                odd[o] = std::fma(to_float(a[2 * d + 1]), to_float(b[d][2 * o + 1]), odd[o]);
            }
        for (int64_t o = 0; o < TILE_ROWS; ++o) c[o] += even[o] + odd[o];
        std::memcpy(plain_tile(C).bytes[r], c, sizeof c);
    }
}

#endif

#endif
