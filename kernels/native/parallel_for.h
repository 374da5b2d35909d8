// Work shared by threads: items by number, each taken by a thread that is free.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <type_traits>
#include <vector>

#include "points.h"

// GOMP_parallel of the OpenMP runtime that is in the process already; null: the caller's thread does everything.
using RunParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

template <class Body>
class ParallelFor {
  public:
    // Calls body(i) for all i below num_items. Throws std::bad_alloc if one of the calls did.
    //
    // A body may take a Pause too: it asks it now and then, and where it leaves its item it returns false, and is called
    // for that item once more.
    static void run(RunParallel run_parallel, int64_t num_threads, int64_t num_items, const Body &body) {
        ParallelFor loop(num_items, body);
        num_threads = std::min(num_threads, num_items);
        do {
            if (num_threads > 1 && run_parallel != nullptr)
                run_parallel(&ParallelFor::member, &loop, static_cast<unsigned>(num_threads), 0);
            else
                member(&loop);
            if (loop.failed_.load()) throw std::bad_alloc();
        } while (loop.pause_.overtakes());
    }

  private:
    ParallelFor(int64_t num_items, const Body &body) : num_items_(num_items), body_(body) {}

    static void member(void *self) {
        ParallelFor &loop = *static_cast<ParallelFor *>(self);
        // Products with denormal numbers are a hundred times slower, and 1e-38 of anything is nothing here.
        const unsigned before = _mm_getcsr();
        _mm_setcsr(before | 0x8040);
        try {
            for (int64_t i; (i = loop.take()) < loop.num_items_;) {
                loop.compute(i);
                if (loop.pause_.is_asked()) break;
            }
        } catch (const std::bad_alloc &) {
            loop.failed_.store(true);
        }
        _mm_setcsr(before);
    }

    int64_t take() {
        if (num_left_.load(std::memory_order_relaxed) > 0) {
            const std::lock_guard<std::mutex> lock(left_lock_);
            if (!left_.empty()) {
                const int64_t item = left_.back();
                left_.pop_back();
                num_left_.store(left_.size(), std::memory_order_relaxed);
                return item;
            }
        }
        return next_.load(std::memory_order_relaxed) < num_items_ ? next_.fetch_add(1) : num_items_;
    }

    void compute(int64_t item) {
        if constexpr (std::is_invocable_v<const Body &, int64_t, Pause &>) {
            if (body_(item, pause_)) return;
            const std::lock_guard<std::mutex> lock(left_lock_);
            left_.push_back(item);
            num_left_.store(left_.size(), std::memory_order_relaxed);
        } else {
            body_(item);
        }
    }

    const int64_t num_items_;
    const Body &body_;
    Pause pause_;
    std::atomic<int64_t> next_{0};
    std::mutex left_lock_;
    std::vector<int64_t> left_;  // items that were begun
    std::atomic<size_t> num_left_{0};
    std::atomic<bool> failed_{false};
};

// What an entry point returns: 0, or 1 when memory ran out, or after an error at a point.
template <class Body>
static int is_out_of_memory(const Body &body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (const PointFailed &) {
        return 1;
    }
}

template <class Body>
static void parallel_for(RunParallel run_parallel, int64_t num_threads, int64_t num_items, const Body &body) {
    ParallelFor<Body>::run(run_parallel, num_threads, num_items, body);
}
