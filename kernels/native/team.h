// Work shared by threads: items by number, each taken by whoever is free.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

// GOMP_parallel of the OpenMP runtime that is in the process already; null: the caller's thread does everything.
using RunTeam = void (*)(void (*)(void *), void *, unsigned, unsigned);

template <class Body>
class Team {
  public:
    // Calls body(i) for all i below num_items. Throws std::bad_alloc if one of the calls did.
    static void run(RunTeam run_team, int64_t num_threads, int64_t num_items, const Body &body) {
        Team team(num_items, body);
        num_threads = std::min(num_threads, num_items);
        if (num_threads > 1 && run_team != nullptr)
            run_team(&Team::member, &team, static_cast<unsigned>(num_threads), 0);
        else
            member(&team);
        if (team.failed_.load()) throw std::bad_alloc();
    }

  private:
    Team(int64_t num_items, const Body &body) : num_items_(num_items), body_(body) {}

    static void member(void *self) {
        Team &team = *static_cast<Team *>(self);
        // Products with denormal numbers are a hundred times slower, and 1e-38 of anything is nothing here.
        const unsigned before = _mm_getcsr();
        _mm_setcsr(before | 0x8040);
        try {
            for (int64_t i; (i = team.next_.fetch_add(1)) < team.num_items_;) team.body_(i);
        } catch (const std::bad_alloc &) {
            team.failed_.store(true);
        }
        _mm_setcsr(before);
    }

    const int64_t num_items_;
    const Body &body_;
    std::atomic<int64_t> next_{0};
    std::atomic<bool> failed_{false};
};

template <class Body>
static void share(RunTeam run_team, int64_t num_threads, int64_t num_items, const Body &body) {
    Team<Body>::run(run_team, num_threads, num_items, body);
}
