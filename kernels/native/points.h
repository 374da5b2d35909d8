// Points inside long calls of the library. At one the thread that called it looks whether other work goes first; if so,
// all threads leave what they are at, between two parts of it, that thread does the other work, and all go on.
//
// What the other work calls of the library has no points, and memory of its own (PerDepth).
#pragma once

#include <atomic>
#include <cstdint>

// What the caller is asked: whether other work goes first (1: yes); to do it; to settle with other ranks what goes
// before that which they do together next. Below 0: an error, which ends the call.
enum PointKind : int { LOOK, OVERTAKE, AGREE };

struct PointState {
    int (*at)(int kind) = nullptr;  // null: there are no points
    int64_t interval_ns = 0, due_ns = 0;
    int depth = 0;  // 1: while other work is done at a point
};
inline thread_local PointState point_state;

// An error at a point; the entry point returns.
struct PointFailed {};

// One job of several threads that may be left and gone on with.
class Pause {
  public:
    Pause() : points_(point_state.at != nullptr && point_state.depth == 0 ? &point_state : nullptr) {}

    // Asked by every thread between two parts of its work. Only the one that has called the library looks.
    bool is_asked() {
        if (points_ == nullptr) return false;
        return is_asked_.load(std::memory_order_relaxed) || (points_ == &point_state && looks());
    }
    // On the thread that called, when no other is at work. Whether other work has been done.
    bool overtakes();

  private:
    bool looks();

    PointState *const points_;
    std::atomic<bool> is_asked_{false};
};

// Before something that is done together with other ranks. No points any more until they are set again.
void agree_at_point();

// A T of this thread for the work at hand, and one for what is done at its points.
template <class T>
class PerDepth {
  public:
    T &now() { return of_depth_[point_state.depth]; }

  private:
    T of_depth_[2];
};
