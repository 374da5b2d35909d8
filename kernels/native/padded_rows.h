// The bf16 inputs of a linear layer as products of tiles and pairs read them: padded to what these take at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "calls.h"
#include "linear_output.h"

// Rows are read where they lie if their width is right already.
class PaddedRows {
  public:
    explicit PaddedRows(const LinearCall &call)
        : call_(call), slices_(call), depth_(slices_.whole_depth), in_(call.in) {}

    static constexpr int64_t MIN_PARALLEL_INPUTS = 1 << 18;  // some 50 us of copying: what waking a thread takes
    using Input = uint16_t;

    int64_t num_copied_inputs() const { return call_.num_inputs == depth_ ? 0 : call_.num_rows * depth_; }
    int64_t num_copies() const {
        return call_.num_inputs == depth_ ? 0 : (call_.num_rows + ROWS_OF_COPY - 1) / ROWS_OF_COPY;
    }
    void copy_to(uint16_t *memory) {
        copied_ = memory;
        if (num_copies() > 0) in_ = memory;
    }
    void copy(int64_t i) const {
        for (int64_t r = i * ROWS_OF_COPY; r < std::min((i + 1) * ROWS_OF_COPY, call_.num_rows); ++r) {
            for (int64_t s = slices_.first_slice; s < slices_.first_slice + slices_.num_slices; ++s) {
                uint16_t *const to = copied_ + r * depth_ + s * slices_.depth;
                std::copy_n(call_.in + r * call_.num_inputs + s * slices_.num_inputs, slices_.num_inputs, to);
                std::fill(to + slices_.num_inputs, to + slices_.depth, 0);
            }
        }
    }

  protected:
    // From the first input on that is summed up; the next row is depth_ further.
    const uint16_t *row(int64_t r) const { return in_ + r * depth_ + slices_.first(); }

    const LinearCall &call_;
    const SlicedInputs slices_;
    const int64_t depth_;

  private:
    static constexpr int64_t ROWS_OF_COPY = 16;
    const uint16_t *in_;
    uint16_t *copied_ = nullptr;
};
