// Attention over one rank's shard of requests whose keys lie on several: given to the other ranks, theirs taken, merged.
//
// What a rank gives are results of nodes of the merge tree (merge_tree.h), not rounded and not normalised. Every rank ends
// the same tree, and it is that of a rank that has all keys: so all of them have its output, to the last bit.
//
// One call a layer: when attention has gone through tens of megabytes of keys nothing else is in the caches, and each
// step of this from Python would wait for memory. Ranks of one machine exchange results through slots of memory they
// share; what the slots and counters are, and why two slots are enough: megatron_medha/parallel/shm_channel.py.

#include <immintrin.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "layout.h"
#include "merge_tree.h"
#include "parallel_for.h"
#include "spin_pool.h"
#include "storage.h"
#include "sums.h"

namespace {

constexpr int FAILED = 1, NOT_YET = 2;  // FAILED: as is_out_of_memory returns it
constexpr int CHECKS_PER_YIELD = 64;  // some 3 us
constexpr int64_t MIN_PARALLEL_NUMBERS = 1 << 18;  // of all results that are merged

// Between this rank and another one. A counter holds the number of the last message; message n lies in slot n % 2.
struct Link {
    char *leaving[2];
    const char *arriving[2];
    int64_t *num_sent;
    const int64_t *num_arrived;
};

// A rank's part of a chunk's keys: the nodes it has results of, by their first partitions.
struct Shard {
    int64_t rank;
    const int64_t *node_starts;
    int64_t num_nodes;
};

// Rows of one chunk, and the shards they see in the order of the keys.
struct SharedChunk {
    int64_t first_row, num_rows;
    const Shard *shards;
    int64_t num_shards;

    const Shard *shard_of(int64_t rank) const {
        const Shard *found = std::find_if(shards, shards + num_shards, [&](const Shard &s) { return s.rank == rank; });
        return found == shards + num_shards ? nullptr : found;
    }
};

// Read by native_structs.py, field by field.
struct Exchange {
    const Link *links;  // by rank; that to oneself is never read
    int64_t num_ranks, rank;
    const SharedChunk *chunks;  // of this rank, in the order of its rows
    int64_t num_chunks;
    const float *const *arrived;  // by rank: results that came another way than through links; else null
    int64_t attended_ns;  // set: the monotonic clock when this rank's own attention was done
};

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

// What goes to a rank: of each chunk that both have, in order, all that this one has of it.
void send(const Call &call, const Exchange &exchange, int64_t peer) {
    const Link &link = exchange.links[peer];
    const int64_t number = *link.num_sent + 1;
    const float *from = call.nodes;
    char *const slot = link.leaving[number % 2];
    char *to = slot;
    for (int64_t i = 0; i < exchange.num_chunks; ++i) {
        const SharedChunk &chunk = exchange.chunks[i];
        const int64_t size = chunk.num_rows * chunk.shard_of(exchange.rank)->num_nodes * node_size(call);
        if (chunk.shard_of(peer) != nullptr) {
            std::memcpy(to, from, size * sizeof(float));
            to += size * sizeof(float);
        }
        from += size;
    }
    if (to != slot) __atomic_store_n(link.num_sent, number, __ATOMIC_RELEASE);
}

bool shares_with(const Exchange &exchange, int64_t peer) {
    const auto has_peer = [&](const SharedChunk &chunk) { return chunk.shard_of(peer) != nullptr; };
    return peer != exchange.rank && std::any_of(exchange.chunks, exchange.chunks + exchange.num_chunks, has_peer);
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

// The results of one chunk, merged.
template <class T>
class ChunkMerge {
  public:
    // next: of each rank, where its results of this chunk begin; moved on behind them.
    ChunkMerge(const Call &call, const SharedChunk &chunk, std::vector<const float *> &next) : call_(call), chunk_(chunk) {
        for (int64_t s = 0; s < chunk.num_shards; ++s) {
            const Shard &shard = chunk.shards[s];
            results_.push_back(next[shard.rank]);
            next[shard.rank] += chunk.num_rows * shard.num_nodes * node_size(call);
            num_nodes_ += shard.num_nodes;
        }
    }

    int64_t num_numbers() const { return chunk_.num_rows * num_nodes_ * node_size(call_); }

    void merge_token(int64_t token) const {
        for (int64_t head = 0; head < num_heads(call_); ++head) merge_row(token, head);
    }

  private:
    void merge_row(int64_t token, int64_t head) const {
        const int64_t head_dim = call_.head_dim, dim = (head_dim + GROUP - 1) / GROUP * GROUP, size = Sums::size(1, dim);
        static thread_local Buffer memory;
        float *const sums = memory.at_least<float>(size * std::min(num_nodes_ + 1, MergeTree::MAX_PLACES));
        const auto place = [&](int64_t index) { return Sums(sums + index * size, 1); };
        const auto merge = [&](int64_t index) { place(index).merge(place(index + 1), 1, dim); };
        MergeTree tree;
        for (int64_t s = 0; s < chunk_.num_shards; ++s) {
            const Shard &shard = chunk_.shards[s];
            for (int64_t n = 0; n < shard.num_nodes; ++n) {
                const int64_t index = (token * shard.num_nodes + n) * num_heads(call_) + head;
                const float *const from = results_[s] + index * (head_dim + 2);
                if (from[head_dim] == MINUS_INFINITY) continue;
                const Sums to = place(tree.place_for(shard.node_starts[n], merge));
                std::fill_n(std::copy_n(from, head_dim, to.values), dim - head_dim, 0.0f);
                to.max[0] = from[head_dim];
                to.total[0] = from[head_dim + 1];
            }
        }
        if (!tree.finish(merge)) place(0).max[0] = MINUS_INFINITY;
        const int64_t index = (chunk_.first_row + token) * num_heads(call_) + head;
        float *const lse = call_.lse == nullptr ? nullptr : call_.lse + index;
        const float *const sink = call_.sinks == nullptr ? nullptr : call_.sinks + head;
        write_row(place(0), 0, dim, head_dim, sink, static_cast<T *>(call_.out) + index * head_dim, lse);
    }

    const Call &call_;
    const SharedChunk &chunk_;
    std::vector<const float *> results_;  // of each shard
    int64_t num_nodes_ = 0;
};

template <class T>
void merge_chunks(const Call &call, const Exchange &exchange) {
    std::vector<const float *> next(exchange.num_ranks);
    for (int64_t rank = 0; rank < exchange.num_ranks; ++rank) {
        if (rank == exchange.rank)
            next[rank] = call.nodes;
        else if (exchange.arrived != nullptr)
            next[rank] = exchange.arrived[rank];
        else if (shares_with(exchange, rank)) {
            const Link &link = exchange.links[rank];
            next[rank] = reinterpret_cast<const float *>(link.arriving[*link.num_sent % 2]);
        }
    }
    for (int64_t i = 0; i < exchange.num_chunks; ++i) {
        const ChunkMerge<T> merge(call, exchange.chunks[i], next);
        const int64_t threads = useful_threads(
            call.run_parallel, call.num_threads, merge.num_numbers(), MIN_PARALLEL_NUMBERS
        );
        const auto merge_token = [&](int64_t token) { merge.merge_token(token); };
        parallel_for(call.run_parallel, threads, exchange.chunks[i].num_rows, merge_token);
    }
}

}  // namespace

// Take the other ranks' results of what was sent last, or those in `arrived`, and merge them with those in call->nodes
// into call->out and call->lse. 0, FAILED when memory ran out, or NOT_YET: not all had come after so long, nothing was
// merged, and the call may be made again.
extern "C" int medha_merge_shards(const Call *call, const Exchange *exchange, int64_t wait_ns) {
    const int64_t deadline_ns = now_ns() + wait_ns;
    for (int64_t rank = 0; exchange->arrived == nullptr && rank < exchange->num_ranks; ++rank)
        if (shares_with(*exchange, rank) && !has_come(exchange->links[rank], deadline_ns)) return NOT_YET;
    return is_out_of_memory([&] {
        call->is_bf16 ? merge_chunks<uint16_t>(*call, *exchange) : merge_chunks<float>(*call, *exchange);
    });
}

// medha_attend, whose results in call->nodes go to the other ranks. Then, with wait_ns > 0, medha_merge_shards.
extern "C" int medha_attend_shard(const Call *call, Exchange *exchange, int64_t wait_ns) {
    if (medha_attend(call) || is_out_of_memory(agree_at_point)) return FAILED;
    exchange->attended_ns = now_ns();
    for (int64_t rank = 0; rank < exchange->num_ranks; ++rank)
        if (shares_with(*exchange, rank)) send(*call, *exchange, rank);
    return wait_ns > 0 ? medha_merge_shards(call, exchange, wait_ns) : 0;
}
