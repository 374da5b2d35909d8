// Slices of a layer's inputs, whose sums are added up in a binary tree: a rank with a subtree of them has one partial sum,
// and ranks that go on with the same tree have the bits of one rank with all of them.
#pragma once

#include <cstdint>

#include "simd.h"

constexpr int64_t MAX_SLICES = 8;       // of a weight on one rank; a power of two
constexpr int64_t MAX_TREE_DEPTH = 3;

// sums [size] = what multiply(slice, sums) gives for `count` slices from `first` on, added up by add(to, from).
// memory: for as many times `size` floats as the tree is deep.
template <class Multiply, class Add>
void add_up_slices(
    int64_t first, int64_t count, float *sums, int64_t size, float *memory, const Multiply &multiply, const Add &add
) {
    if (count == 1) return multiply(first, sums);
    add_up_slices(first, count / 2, sums, size, memory, multiply, add);
    add_up_slices(first + count / 2, count / 2, memory, size, memory + size, multiply, add);
    add(sums, memory);
}

// size: a multiple of WIDTH.
template <class Multiply>
void add_up_slices(int64_t first, int64_t count, float *sums, int64_t size, float *memory, const Multiply &multiply) {
    add_up_slices(first, count, sums, size, memory, multiply, [&](float *to, const float *from) {
        for (int64_t i = 0; i < size; i += WIDTH) store(to + i, load(to + i) + load(from + i));
    });
}
