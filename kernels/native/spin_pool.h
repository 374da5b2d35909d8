// Threads that stay awake for the length of one call with many small jobs, each of a few microseconds.
//
// Waking a sleeping OpenMP thread takes some 50 us, and a parallel region ends when all its threads have come. A decode
// step of a small model has a hundred jobs of 20 us. Here a job is posted in one word of memory; a thread that is awake and
// free joins it, and nobody waits for one who has not joined: a worker that the system has put aside delays nothing.
#pragma once

#include "parallel_for.h"

// A RunParallel; between PoolScope's constructor and destructor, on the thread that made it.
void run_in_spin_pool(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);

inline bool is_spinning(RunParallel run_parallel) { return run_parallel == &run_in_spin_pool; }

// Below this a second thread costs more than it saves. asleep: the same where it must be woken first.
inline int64_t useful_threads(RunParallel run_parallel, int64_t num_threads, int64_t work, int64_t asleep) {
    constexpr int64_t WAKING_OVER_JOINING = 32;  // some 50 us over 1 to 2
    return work >= (is_spinning(run_parallel) ? asleep / WAKING_OVER_JOINING : asleep) ? num_threads : 1;
}

// Workers stand ready while this lives. One at a time in a process; further ones get no workers, unless the same thread
// makes them within a PoolBreak.
class PoolScope {
  public:
    explicit PoolScope(int64_t num_threads);
    ~PoolScope();
    PoolScope(const PoolScope &) = delete;
    PoolScope &operator=(const PoolScope &) = delete;
    // What `parallel_for` takes; null: work alone.
    RunParallel runner() const { return has_pool_ ? &run_in_spin_pool : nullptr; }

  private:
    bool has_pool_;
    const bool is_inner_;
};

// While this lives, between two jobs, the workers of this thread's PoolScope sleep.
class PoolBreak {
  public:
    PoolBreak();
    ~PoolBreak();
    PoolBreak(const PoolBreak &) = delete;
    PoolBreak &operator=(const PoolBreak &) = delete;
};
