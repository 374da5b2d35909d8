// Memory that will be read next, fetched between other work. For chunks of a prompt; decodes fetch as they read.
#pragma once

#include <algorithm>
#include <cstdint>

// A run of memory, fetched in num_calls parts: a burst of fetches would itself be waited for.
class Prefetcher {
  public:
    Prefetcher(const void *from, int64_t bytes, int64_t num_calls)
        : next_(static_cast<const char *>(from)), end_(next_ + bytes), part_bytes_((bytes / num_calls / LINE + 1) * LINE) {}

    void fetch() {
        for (const char *const end = std::min(next_ + part_bytes_, end_); next_ < end; next_ += LINE)
            __builtin_prefetch(next_, 0, 2);
    }

  private:
    static constexpr int64_t LINE = 64;
    const char *next_, *const end_;
    const int64_t part_bytes_;
};
