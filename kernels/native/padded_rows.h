// The bf16 inputs of a linear layer as products of tiles and pairs read them: padded to what these take at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "calls.h"
#include "linear_output.h"

// Rows are read where they lie if their width is right already.
class PaddedRows {
  public:
    explicit PaddedRows(const LinearCall &call) : call_(call), depth_(padded_inputs(call.num_inputs)), in_(call.in) {}

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
            std::copy_n(call_.in + r * call_.num_inputs, call_.num_inputs, copied_ + r * depth_);
            std::fill(copied_ + r * depth_ + call_.num_inputs, copied_ + (r + 1) * depth_, 0);
        }
    }

  protected:
    const uint16_t *row(int64_t r) const { return in_ + r * depth_; }

    const LinearCall &call_;
    const int64_t depth_;

  private:
    static constexpr int64_t ROWS_OF_COPY = 16;
    const uint16_t *in_;
    uint16_t *copied_ = nullptr;
};
