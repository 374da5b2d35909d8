// Threads that stay awake for the length of one call with many small jobs, each of a few microseconds.
//
// Waking a sleeping OpenMP thread takes some 50 us, and a parallel region ends when all its threads have come. A decode
// step of a small model has a hundred jobs of 20 us. Here a job is posted in one word of memory; whoever is awake and
// free joins it, and nobody waits for one who has not joined: a worker that the system has put aside delays nothing.
#pragma once

#include "team.h"

// A RunTeam; between Shift's constructor and destructor, on the thread that made it.
void run_crew(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);

inline bool is_awake(RunTeam run_team) { return run_team == &run_crew; }

// Below this a second thread costs more than it saves. asleep: the same where it must be woken first.
inline int64_t threads_worth_it(RunTeam run_team, int64_t num_threads, int64_t work, int64_t asleep) {
    constexpr int64_t WAKING_OVER_JOINING = 32;  // some 50 us over 1 to 2
    return work >= (is_awake(run_team) ? asleep / WAKING_OVER_JOINING : asleep) ? num_threads : 1;
}

// Workers stand ready while this lives. One at a time in a process; further ones get no workers.
class Shift {
  public:
    explicit Shift(int64_t num_threads);
    ~Shift();
    Shift(const Shift &) = delete;
    Shift &operator=(const Shift &) = delete;
    // What `share` takes; null: work alone.
    RunTeam team() const { return has_crew_ ? &run_crew : nullptr; }

  private:
    bool has_crew_;
};
