// The order in which results over consecutive keys are merged: one binary tree over all partitions of keys.
//
// A partition is some keys from a fixed position of the sequence on. Partition p is a leaf, and a node is 2^k neighbouring
// leaves from a multiple of 2^k on: its result is that of its first half merged with that of its second. A half
// without keys is left out. So a row's bits depend on the keys it sees, and not on who has computed which nodes.
#pragma once

#include <cstdint>

// Places of results that are still to be merged, as a binary counter has digits. Callers keep the results themselves.
class MergeTree {
  public:
    static constexpr int64_t MAX_PLACES = 65;

    // Of partitions [first, end), computed one by one.
    static int64_t num_places(int64_t first, int64_t end) { return first < end ? level(first, end - 1) + 2 : 1; }

    // Where the next result goes, over keys from partition `first` on. Before, what belongs together without it is
    // merged: merge(place) adds the result after that place to it.
    template <class Merge>
    int64_t place_for(int64_t first, const Merge &merge) {
        while (size_ > 1 && level(firsts_[size_ - 2], firsts_[size_ - 1]) <= level(firsts_[size_ - 1], first))
            merge(--size_ - 1);
        firsts_[size_] = first;
        return size_++;
    }

    // All that there is, into place 0; false: there is nothing.
    template <class Merge>
    bool finish(const Merge &merge) {
        while (size_ > 1) merge(--size_ - 1);
        const bool has_result = size_ == 1;
        size_ = 0;
        return has_result;
    }

    // Where the largest node ends that begins with `first` and does not go beyond `end`.
    static int64_t end_of_node(int64_t first, int64_t end) {
        int64_t size = 1;
        while (first % (2 * size) == 0 && first + 2 * size <= end) size *= 2;
        return first + size;
    }

    // Nodes that [first, end) falls into.
    static int64_t num_nodes(int64_t first, int64_t end) {
        int64_t count = 0;
        for (; first < end; first = end_of_node(first, end)) ++count;
        return count;
    }

  private:
    // Of the halves that two partitions part into; -1: they are the same.
    static int64_t level(int64_t a, int64_t b) { return a == b ? -1 : 63 - __builtin_clzll(a ^ b); }

    int64_t firsts_[MAX_PLACES];
    int64_t size_ = 0;
};
