// See spin_pool.h.

#include "spin_pool.h"

#include <sched.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

// Some 50 us: the gaps between the jobs of a step are shorter. After that others may have the core.
constexpr int NUM_SPINS = 1000;
constexpr uint64_t OPEN = 1 << 15, MEMBERS = OPEN - 1;
constexpr int NUMBER_SHIFT = 16;

class Pause {
  public:
    void once() {
        if (++count_ < NUM_SPINS)
            _mm_pause();
        else
            sched_yield();
    }
    void reset() { count_ = 0; }

  private:
    int count_ = 0;
};

struct SpinPool {
    // Number of the job, whether it may still be joined, and how many workers are at it.
    alignas(64) std::atomic<uint64_t> job{0};
    alignas(64) std::atomic<bool> is_on_duty{false};
    void (*body)(void *) = nullptr;
    void *data = nullptr;
    std::mutex duty;  // held while the pool is in use
    std::mutex door;
    std::condition_variable called;
    int64_t num_workers = 0;

    void put_on_duty() {
        {
            const std::lock_guard<std::mutex> lock(door);
            is_on_duty.store(true);
        }
        called.notify_all();
    }

    // Never destroyed: workers sleep in it when the process ends.
    static SpinPool &get() {
        static SpinPool *const pool = new SpinPool;
        return *pool;
    }

    void work() {
        uint64_t last = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(door);
                called.wait(lock, [this] { return is_on_duty.load(); });
            }
            Pause pause;
            while (is_on_duty.load(std::memory_order_acquire)) {
                uint64_t seen = job.load(std::memory_order_acquire);
                if (!(seen & OPEN) || seen >> NUMBER_SHIFT == last) {
                    pause.once();
                    continue;
                }
                if (!job.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
                last = seen >> NUMBER_SHIFT;
                body(data);
                job.fetch_sub(1, std::memory_order_acq_rel);
                pause.reset();
            }
        }
    }

    void run(void (*new_body)(void *), void *new_data) {
        body = new_body;
        data = new_data;
        const uint64_t number = (job.load(std::memory_order_relaxed) >> NUMBER_SHIFT) + 1;
        job.store(number << NUMBER_SHIFT | OPEN, std::memory_order_release);
        new_body(new_data);
        job.fetch_and(~OPEN, std::memory_order_acq_rel);
        Pause pause;
        while (job.load(std::memory_order_acquire) & MEMBERS) pause.once();
    }
};

thread_local bool has_pool_of_thread = false;  // this thread has made a PoolScope that has the pool

}  // namespace

void run_in_spin_pool(void (*body)(void *), void *data, unsigned, unsigned) { SpinPool::get().run(body, data); }

PoolScope::PoolScope(int64_t num_threads) : has_pool_(false), is_inner_(has_pool_of_thread) {
    if (num_threads < 2) return;
    SpinPool &pool = SpinPool::get();
    if (!is_inner_ && !pool.duty.try_lock()) return;
    has_pool_ = has_pool_of_thread = true;
    try {
        for (; pool.num_workers < num_threads - 1; ++pool.num_workers) std::thread([&pool] { pool.work(); }).detach();
    } catch (const std::system_error &) {  // no more threads to be had: fewer do the same work
    }
    pool.put_on_duty();
}

PoolScope::~PoolScope() {
    if (!has_pool_) return;
    SpinPool &pool = SpinPool::get();
    pool.is_on_duty.store(false, std::memory_order_release);
    if (is_inner_) return;
    has_pool_of_thread = false;
    pool.duty.unlock();
}

PoolBreak::PoolBreak() {
    if (has_pool_of_thread) SpinPool::get().is_on_duty.store(false, std::memory_order_release);
}

PoolBreak::~PoolBreak() {
    if (has_pool_of_thread) SpinPool::get().put_on_duty();
}
