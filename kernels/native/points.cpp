// See points.h.

#include "points.h"

#include <immintrin.h>
#include <time.h>

#include "parallel_for.h"
#include "spin_pool.h"

namespace {

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

}  // namespace

bool Pause::looks() {
    if (now_ns() < points_->due_ns) return false;
    // Others than we may need denormal numbers; see ParallelFor.
    const unsigned ours = _mm_getcsr();
    _mm_setcsr(ours & ~0x8040u);
    const bool is_asked = points_->at(LOOK) != 0;
    _mm_setcsr(ours);
    points_->due_ns = now_ns() + points_->interval_ns;
    if (is_asked) is_asked_.store(true, std::memory_order_relaxed);
    return is_asked;
}

bool Pause::overtakes() {
    if (!is_asked_.load(std::memory_order_relaxed)) return false;
    is_asked_.store(false, std::memory_order_relaxed);
    int found;
    {
        const PoolBreak others_sleep;
        ++points_->depth;
        found = points_->at(OVERTAKE);
        --points_->depth;
    }
    if (found < 0) throw PointFailed();
    points_->due_ns = now_ns() + points_->interval_ns;
    return true;
}

void agree_at_point() {
    if (point_state.at == nullptr || point_state.depth > 0) return;
    const auto at = point_state.at;
    point_state.at = nullptr;
    ++point_state.depth;
    const int found = at(AGREE);
    --point_state.depth;
    if (found < 0) throw PointFailed();
}

// at: called on this thread, from calls of the library, at most once in interval_ns; null: never.
extern "C" void medha_set_points(int (*at)(int), int64_t interval_ns) {
    point_state.at = at;
    point_state.interval_ns = interval_ns;
    point_state.due_ns = now_ns() + interval_ns;
}
