// Attention over one rank's shard of requests whose keys lie on several: given to the other ranks, theirs taken, merged.
//
// One call a layer: when attention has gone through tens of megabytes of keys nothing else is in the caches, and each
// step of this from Python would wait for memory. Ranks of one machine exchange parts through slots of memory they
// share; what the slots and counters are, and why two slots are enough: megatron_medha/parallel/shm_channel.py.

#include <immintrin.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "layout.h"
#include "storage.h"
#include "sums.h"

namespace {

constexpr int FAILED = 1, NOT_YET = 2;  // FAILED: as is_out_of_memory returns it
constexpr int CHECKS_PER_YIELD = 64;  // some 3 us

// Between this rank and another one. A counter holds the number of the last message; message n lies in slot n % 2.
struct Link {
    char *leaving[2];
    const char *arriving[2];
    int64_t *num_sent;
    const int64_t *num_arrived;
};

// Rows that the same ranks attend to together.
struct RankSet {
    int64_t first_row, num_rows;
    const int64_t *ranks;  // ascending
    int64_t num_ranks;

    bool has(int64_t rank) const { return std::find(ranks, ranks + num_ranks, rank) != ranks + num_ranks; }
};

// Read by native_structs.py, field by field.
struct Exchange {
    const Link *links;  // by rank; that to oneself is never read
    int64_t num_ranks, rank;
    const RankSet *sets;
    int64_t num_sets;
    int64_t attended_ns;  // set: the monotonic clock when this rank's own attention was done
};

// Read by native_structs.py, field by field.
struct Merge {
    int64_t is_bf16, num_rows, num_heads, head_dim;
    const void *const *outs;    // of each part, [T, H, D]
    const float *const *lses;   // [T, H]
    int64_t num_parts;
    void *out;                  // may be one of outs
};

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

// Outputs of some rows, each normalised over its own keys, merged into the output over all of them, row by row: by
// weights exp(lse), relative to the largest. A part without keys (-inf) has no weight, and its output is not looked at.
template <class T>
void merge_rows(const Merge &merge) {
    std::vector<float> weights(merge.num_parts), sum(merge.head_dim);
    for (int64_t row = 0; row < merge.num_rows * merge.num_heads; ++row) {
        float largest = MINUS_INFINITY, total = 0.0f;
        for (int64_t p = 0; p < merge.num_parts; ++p) largest = std::max(largest, merge.lses[p][row]);
        for (int64_t p = 0; p < merge.num_parts; ++p) {
            const float lse = merge.lses[p][row];
            weights[p] = lse == MINUS_INFINITY ? 0.0f : std::exp(lse - largest);
            total += weights[p];
        }
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t p = 0; p < merge.num_parts; ++p) {
            if (weights[p] == 0.0f) continue;
            const float share = weights[p] / total;
            const T *const part = static_cast<const T *>(merge.outs[p]) + row * merge.head_dim;
            for (int64_t d = 0; d < merge.head_dim; ++d) sum[d] += to_float(part[d]) * share;
        }
        T *const out = static_cast<T *>(merge.out) + row * merge.head_dim;
        for (int64_t d = 0; d < merge.head_dim; ++d) from_float(sum[d], out + d);
    }
}

void run(const Merge &merge) { merge.is_bf16 ? merge_rows<uint16_t>(merge) : merge_rows<float>(merge); }

// What goes to a rank, and comes from it: outputs of the rows both attend to, behind them, aligned, log-sum-exps.
struct Message {
    int64_t out_bytes, lse_bytes;  // of a row
    int64_t num_rows = 0;          // none: nothing is exchanged with that rank

    Message(const Call &call, const Exchange &exchange, int64_t peer) {
        const int64_t num_heads = call.num_kv_heads * call.queries_per_kv_head;
        out_bytes = num_heads * call.head_dim * (call.is_bf16 ? 2 : 4);
        lse_bytes = num_heads * 4;
        if (peer == exchange.rank) return;
        for (int64_t i = 0; i < exchange.num_sets; ++i)
            if (exchange.sets[i].has(peer)) num_rows += exchange.sets[i].num_rows;
    }
    int64_t out_at(int64_t row) const { return row * out_bytes; }
    int64_t lse_at(int64_t row) const { return (num_rows * out_bytes + 7) / 8 * 8 + row * lse_bytes; }
};

void send(const Call &call, const Exchange &exchange, int64_t peer) {
    const Message message(call, exchange, peer);
    if (message.num_rows == 0) return;
    const Link &link = exchange.links[peer];
    const int64_t number = *link.num_sent + 1;
    char *const slot = link.leaving[number % 2];
    int64_t to = 0;
    for (int64_t i = 0; i < exchange.num_sets; ++i) {
        const RankSet &set = exchange.sets[i];
        if (!set.has(peer)) continue;
        const char *const out = static_cast<const char *>(call.out) + set.first_row * message.out_bytes;
        const char *const lse = reinterpret_cast<const char *>(call.lse) + set.first_row * message.lse_bytes;
        std::memcpy(slot + message.out_at(to), out, set.num_rows * message.out_bytes);
        std::memcpy(slot + message.lse_at(to), lse, set.num_rows * message.lse_bytes);
        to += set.num_rows;
    }
    __atomic_store_n(link.num_sent, number, __ATOMIC_RELEASE);
}

// Whether the peer's answer to what was sent to it last came before the deadline.
bool has_come(const Link &link, int64_t deadline_ns) {
    while (true) {
        for (int i = 0; i < CHECKS_PER_YIELD; ++i) {
            if (__atomic_load_n(link.num_arrived, __ATOMIC_ACQUIRE) >= *link.num_sent) return true;
            _mm_pause();
        }
        if (now_ns() >= deadline_ns) return false;
        sched_yield();  // with fewer cores than ranks the peer may need this one
    }
}

void merge_sets(const Call &call, const Exchange &exchange) {
    std::vector<Message> messages;
    for (int64_t rank = 0; rank < exchange.num_ranks; ++rank) messages.emplace_back(call, exchange, rank);
    std::vector<int64_t> num_read(exchange.num_ranks);
    std::vector<const void *> outs;
    std::vector<const float *> lses;
    for (int64_t i = 0; i < exchange.num_sets; ++i) {
        const RankSet &set = exchange.sets[i];
        const Message &own = messages[exchange.rank];
        char *const own_out = static_cast<char *>(call.out) + set.first_row * own.out_bytes;
        char *const own_lse = reinterpret_cast<char *>(call.lse) + set.first_row * own.lse_bytes;
        outs.clear();
        lses.clear();
        // In ascending order of ranks: the same sum, to the last bit, on all of them.
        for (int64_t r = 0; r < set.num_ranks; ++r) {
            const int64_t rank = set.ranks[r];
            const Link &link = exchange.links[rank];
            const bool is_own = rank == exchange.rank;
            const char *const slot = is_own ? nullptr : link.arriving[*link.num_sent % 2];
            outs.push_back(is_own ? own_out : slot + messages[rank].out_at(num_read[rank]));
            const char *const lse = is_own ? own_lse : slot + messages[rank].lse_at(num_read[rank]);
            lses.push_back(reinterpret_cast<const float *>(lse));
            num_read[rank] += set.num_rows;
        }
        const int64_t num_heads = call.num_kv_heads * call.queries_per_kv_head;
        run(Merge{
            call.is_bf16, set.num_rows, num_heads, call.head_dim, outs.data(), lses.data(), set.num_ranks, own_out
        });
    }
}

}  // namespace

// Take the other ranks' parts of what was sent last, and merge them into call->out. 0, FAILED when memory ran out, or
// NOT_YET: not all had come after so long, nothing was merged, and the call may be made again.
extern "C" int medha_merge_shards(const Call *call, const Exchange *exchange, int64_t wait_ns) {
    try {
        const int64_t deadline_ns = now_ns() + wait_ns;
        for (int64_t rank = 0; rank < exchange->num_ranks; ++rank)
            if (Message(*call, *exchange, rank).num_rows > 0 && !has_come(exchange->links[rank], deadline_ns))
                return NOT_YET;
        merge_sets(*call, *exchange);
        return 0;
    } catch (const std::bad_alloc &) {
        return FAILED;
    }
}

// medha_attend, whose output and log-sum-exps go to the other ranks. Then, with wait_ns > 0, medha_merge_shards.
extern "C" int medha_attend_shard(const Call *call, Exchange *exchange, int64_t wait_ns) {
    if (medha_attend(call)) return FAILED;
    exchange->attended_ns = now_ns();
    for (int64_t rank = 0; rank < exchange->num_ranks; ++rank) send(*call, *exchange, rank);
    return wait_ns > 0 ? medha_merge_shards(call, exchange, wait_ns) : 0;
}

// Parts that came another way, merged by the same arithmetic. 0, or FAILED.
extern "C" int medha_merge(const Merge *merge) {
    return is_out_of_memory([&] { run(*merge); });
}
