// Work shared by threads: items by number, each taken by a thread that is free.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

// GOMP_parallel of the OpenMP runtime that is in the process already; null: the caller's thread does everything.
using RunParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

template <class Body>
class ParallelFor {
  public:
    // Calls body(i) for all i below num_items. Throws std::bad_alloc if one of the calls did.
    static void run(RunParallel run_parallel, int64_t num_threads, int64_t num_items, const Body &body) {
        ParallelFor loop(num_items, body);
        num_threads = std::min(num_threads, num_items);
        if (num_threads > 1 && run_parallel != nullptr)
            run_parallel(&ParallelFor::member, &loop, static_cast<unsigned>(num_threads), 0);
        else
            member(&loop);
        if (loop.failed_.load()) throw std::bad_alloc();
    }

  private:
    ParallelFor(int64_t num_items, const Body &body) : num_items_(num_items), body_(body) {}

    static void member(void *self) {
        ParallelFor &loop = *static_cast<ParallelFor *>(self);
        // Products with denormal numbers are a hundred times slower, and 1e-38 of anything is nothing here.
        const unsigned before = _mm_getcsr();
        _mm_setcsr(before | 0x8040);
        try {
            for (int64_t i; (i = loop.next_.fetch_add(1)) < loop.num_items_;) loop.body_(i);
        } catch (const std::bad_alloc &) {
            loop.failed_.store(true);
        }
        _mm_setcsr(before);
    }

    const int64_t num_items_;
    const Body &body_;
    std::atomic<int64_t> next_{0};
    std::atomic<bool> failed_{false};
};

// What an entry point returns: 0, or 1 when memory ran out.
template <class Body>
static int is_out_of_memory(const Body &body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

template <class Body>
static void parallel_for(RunParallel run_parallel, int64_t num_threads, int64_t num_items, const Body &body) {
    ParallelFor<Body>::run(run_parallel, num_threads, num_items, body);
}
