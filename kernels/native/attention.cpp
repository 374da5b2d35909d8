// Attention of a packed batch over paged keys and values on a CPU: the library behind native_attention.py.
//
// The work is cut into units, one for some query rows of one kv head (rows of all its query heads, folded), and where
// that leaves threads idle also by keys. A row's result is the same to the last bit however the work is cut: keys fall
// into partitions at fixed positions of their sequence; within one, tiles are added by online softmax; partitions are
// merged in one fixed tree (merge_tree.h), also where other ranks have some of them (shards.cpp).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "attention_tiles.h"
#include "layout.h"
#include "merge_tree.h"
#include "parallel_for.h"
#include "prefetcher.h"
#include "simd.h"
#include "spin_pool.h"
#include "storage.h"
#include "sums.h"
#include "tiles.h"

namespace {

// Query rows of a unit: their sums, scores and queries stay in L2 beside a tile of keys (450 KiB at head dim 128). By
// matrix tiles a tile of keys is done with so soon that it must serve more rows, or memory is waited for; processors
// that have them have an L2 of 2 MiB.
constexpr int64_t MAX_UNIT_ROWS_OF[] = {192, 768};
// From so many register tiles of rows on, widening bf16 once per tile of keys is cheaper than at each use.
constexpr int64_t MIN_TILES_TO_WIDEN = 3;
#if defined(HAS_MATRIX_TILES)
template <class T>
constexpr bool USES_TILES = sizeof(T) == 2;
#else
template <class T>
constexpr bool USES_TILES = false;
#endif
template <class T>
constexpr int64_t MAX_UNIT_ROWS = MAX_UNIT_ROWS_OF[USES_TILES<T>];
// Reading keys for a single row takes as long as computing this many.
template <class T>
constexpr int64_t MIN_COST_ROWS = USES_TILES<T> ? 64 : 8;
// Row * key * dim products below which waking a second thread costs more than it saves (some 50 us of work).
template <class T>
constexpr int64_t MIN_PARALLEL_COST = USES_TILES<T> ? 1 << 24 : 1 << 21;
constexpr int64_t WRITE_TOKENS = 64;  // of an item that writes
constexpr int64_t MIN_PARALLEL_WRITE = 1 << 16;  // numbers; likewise

// Some rows of one kv head: folded rows [first_row, end_row) of `rows`, row = token * queries_per_kv_head + query.
struct Unit {
    const Rows *rows;
    int64_t head, first_row, end_row;
    int64_t num_keys;     // that its last row sees
    int64_t first_item, num_items;  // it is cut into
    float *pieces;        // if cut, one Sums for each piece of its items; else null
    std::atomic<int64_t> num_items_left;
};

// Keys of a unit that one thread goes through. If the unit is cut, it leaves a result for each of its pieces, the
// largest nodes of the merge tree that its keys can be divided into.
struct Item {
    Unit *unit;
    int64_t first_key, end_key;
    int64_t first_piece;  // of the unit's
};

template <class T>
class Work {
  public:
    explicit Work(const Call &call) : call_(call), dim_((call.head_dim + GROUP - 1) / GROUP * GROUP) {}

    void run() {
        const int64_t num_pieces = (call_.num_tokens + WRITE_TOKENS - 1) / WRITE_TOKENS;
        if (call_.slots != nullptr) {
            const int64_t count = call_.num_tokens * call_.num_kv_heads * dim_;
            const auto write_piece = [&](int64_t i) {
                const int64_t first = i % num_pieces * WRITE_TOKENS;
                write(i / num_pieces, first, std::min(first + WRITE_TOKENS, call_.num_tokens));
            };
            parallel_for(call_.run_parallel, threads_for(count, MIN_PARALLEL_WRITE), call_.num_kv_heads * num_pieces, write_piece);
        }
        const int64_t cost = plan() * dim_;
        const auto attend_item = [&](int64_t i, Pause &pause) { return attend(i, pause); };
        const int64_t num_items = static_cast<int64_t>(items_.size());
        parallel_for(call_.run_parallel, threads_for(cost, MIN_PARALLEL_COST<T>), num_items, attend_item);
    }

  private:
    int64_t threads_for(int64_t work, int64_t asleep) const {
        return useful_threads(call_.run_parallel, call_.num_threads, work, asleep);
    }

    void write(int64_t head, int64_t first, int64_t end) {
        const int64_t head_dim = call_.head_dim;
        for (int64_t t = first; t < end; ++t) {
            if (call_.slots[t] < 0) continue;
            const int64_t group = call_.slots[t] / GROUP, lane = call_.slots[t] % GROUP;
            const int64_t base = head * call_.pool_head_stride + group * GROUP * dim_;
            T *const k_to = static_cast<T *>(call_.k_pool) + base;
            T *const v_to = static_cast<T *>(call_.v_pool) + base;
            const T *k = static_cast<const T *>(call_.k) + t * call_.k_token_stride + head * call_.k_head_stride;
            const T *v = static_cast<const T *>(call_.v) + t * call_.v_token_stride + head * call_.v_head_stride;
            for (int64_t d = 0; d < head_dim; ++d) k_to[Place<T>::key(lane, d, dim_)] = k[d];
            for (int64_t d = 0; d < head_dim; ++d) v_to[Place<T>::value(lane, d, dim_)] = v[d];
            // Dimensions that only fill up are zeros, so that they add nothing.
            for (int64_t d = head_dim; d < dim_; ++d) {
                k_to[Place<T>::key(lane, d, dim_)] = 0;
                v_to[Place<T>::value(lane, d, dim_)] = 0;
            }
        }
    }

    int64_t keys_of(const Rows &rows, int64_t row) const {  // that a folded row sees
        return rows.num_keys + rows.is_causal * (row / call_.queries_per_kv_head);
    }

    // Units and items; returns the cost of all, in products of rows and keys.
    int64_t plan() {
        const int64_t group = call_.queries_per_kv_head;
        int64_t num_units = 0;
        for (int64_t i = 0; i < call_.num_rows; ++i) num_units += call_.num_kv_heads * blocks_of(call_.rows[i]);
        units_ = std::vector<Unit>(num_units);
        int64_t cost = 0;
        Unit *unit = units_.data();
        for (int64_t i = 0; i < call_.num_rows; ++i) {
            const Rows &rows = call_.rows[i];
            const int64_t num_rows = rows.num_tokens * group, num_blocks = blocks_of(rows);
            for (int64_t head = 0; head < call_.num_kv_heads; ++head)
                for (int64_t b = 0; b < num_blocks; ++b, ++unit) {
                    unit->rows = &rows;
                    unit->head = head;
                    unit->first_row = num_rows * b / num_blocks;
                    unit->end_row = num_rows * (b + 1) / num_blocks;
                    unit->num_keys = keys_of(rows, unit->end_row - 1);
                    cost += cost_of(*unit);
                }
        }
        // A quarter of a thread's share: the last item to end keeps the others waiting for an eighth on average.
        const int64_t target = std::max<int64_t>(1, cost / (4 * call_.num_threads));
        int64_t partial_size = 0;
        // The last ones finer where there are many: all threads end together then.
        const int64_t num_last = num_units >= 8 * call_.num_threads ? 2 * call_.num_threads : 0;
        const int64_t fine_target = std::max(cost / (64 * call_.num_threads), 4 * MIN_PARALLEL_COST<T> / dim_);
        for (int64_t i = 0; i < num_units; ++i)
            partial_size += cut(units_[i], i < num_units - num_last ? target : std::min(target, fine_target));
        static thread_local PerDepth<Buffer> partial_memory;
        float *partial = partial_memory.now().at_least<float>(partial_size);
        for (Unit &u : units_)
            if (u.num_items > 1) {
                u.pieces = partial;
                partial += num_pieces(u) * Sums::size(u.end_row - u.first_row, dim_);
            }
        return cost;
    }

    int64_t blocks_of(const Rows &rows) const {
        return (rows.num_tokens * call_.queries_per_kv_head + MAX_UNIT_ROWS<T> - 1) / MAX_UNIT_ROWS<T>;
    }
    static int64_t rows_that_cost(const Unit &u) { return std::max(u.end_row - u.first_row, MIN_COST_ROWS<T>); }
    static int64_t cost_of(const Unit &u) { return rows_that_cost(u) * u.num_keys; }

    // Appends the unit's items; returns the floats its pieces take.
    int64_t cut(Unit &unit, int64_t target) {
        const Rows &rows = *unit.rows;
        const int64_t keys_per_item = std::max<int64_t>(1, target / rows_that_cost(unit));
        unit.first_item = static_cast<int64_t>(items_.size());
        Item item{&unit, 0, 0, 0};
        const auto end_at = [&](int64_t key) {
            item.end_key = key;
            items_.push_back(item);
            item.first_piece += num_pieces(item);
            item.first_key = key;
        };
        for (int64_t key = 0; key < unit.num_keys; key = rows.first_key_of(rows.partition_of(key) + 1))
            if (key - item.first_key >= keys_per_item) end_at(key);
        end_at(unit.num_keys);  // also without any keys: somebody must write zeros
        unit.num_items = static_cast<int64_t>(items_.size()) - unit.first_item;
        unit.num_items_left.store(unit.num_items);
        unit.pieces = nullptr;
        return unit.num_items > 1 ? item.first_piece * Sums::size(unit.end_row - unit.first_row, dim_) : 0;
    }

    static int64_t num_pieces(const Item &item) {
        const Rows &rows = *item.unit->rows;
        if (item.first_key == item.end_key) return 0;
        return MergeTree::num_nodes(rows.partition_of(item.first_key), rows.partition_of(item.end_key - 1) + 1);
    }
    int64_t num_pieces(const Unit &unit) const {
        const Item &last = items_[unit.first_item + unit.num_items - 1];
        return last.first_piece + num_pieces(last);
    }
    // piece(first partition, first key, end key) for each of an item's, in order.
    template <class Body>
    static void each_piece(const Item &item, const Body &piece) {
        const Rows &rows = *item.unit->rows;
        const int64_t num = num_pieces(item), end = num ? rows.partition_of(item.end_key - 1) + 1 : 0;
        int64_t first = rows.partition_of(item.first_key);
        for (int64_t i = 0; i < num; ++i) {
            const int64_t next = MergeTree::end_of_node(first, end);
            piece(
                first, std::max(item.first_key, rows.first_key_of(first)), std::min(item.end_key, rows.first_key_of(next))
            );
            first = next;
        }
    }

    // A unit's results: its rows' output alone, or what they have of each node of their shard.
    static int64_t num_results(const Unit &unit) { return std::max<int64_t>(1, unit.rows->num_nodes); }
    static int64_t end_key_of(const Unit &unit, int64_t result) {
        const Rows &rows = *unit.rows;
        if (result + 1 >= rows.num_nodes) return unit.num_keys;
        return std::clamp<int64_t>(rows.first_key_of(rows.node_starts[result + 1]), 0, unit.num_keys);
    }

    // What one thread works with: queries of a unit's rows, results to be merged, what tiles of keys take.
    struct Scratch {
        float *queries, *lanes, *tiles, *sums;
        int64_t num_rows, sums_size;
        Sums place(int64_t index) const { return Sums(sums + index * sums_size, num_rows); }
    };

    // How far a thread is with an item.
    struct Progress {
        Buffer memory;
        Scratch scratch;
        MergeTree tree;        // of the result at hand
        int64_t next_key = 0;
        int64_t num_done = 0;  // results, or pieces
    };

    // False: it was left, to be gone on with, at the next partition of its keys.
    bool attend(int64_t number, Pause &pause) {
        const Item &item = items_[number];
        static thread_local Progress progress;
        if (!take_up(number, progress)) begin(item, progress);
        const bool is_done = item.unit->pieces == nullptr ? add_results(*item.unit, progress, pause)
                                                          : add_pieces(item, progress, pause);
        if (!is_done) {
            const std::lock_guard<std::mutex> lock(left_lock_);
            std::swap(left_[number], progress);
        }
        return is_done;
    }

    bool take_up(int64_t number, Progress &progress) {
        const std::lock_guard<std::mutex> lock(left_lock_);
        const auto found = left_.find(number);
        if (found == left_.end()) return false;
        std::swap(found->second, progress);
        left_.erase(found);
        return true;
    }

    void begin(const Item &item, Progress &progress) const {
        const Unit &unit = *item.unit;
        const int64_t num_rows = unit.end_row - unit.first_row, size = Sums::size(num_rows, dim_);
        const int64_t num_places = places_of(item), lanes_size = (num_rows * WIDTH + 15) / 16 * 16;
        float *const queries = progress.memory.template at_least<float>(
            num_rows * dim_ + num_places * size + lanes_size + tile_memory_size(num_rows)
        );
        float *const sums = queries + num_rows * dim_, *const lanes = sums + num_places * size;
        progress.scratch = {queries, lanes, lanes + lanes_size, sums, num_rows, size};
        progress.tree = MergeTree();
        progress.next_key = item.first_key;
        progress.num_done = 0;
        pack_queries(unit, queries);
    }

    // Of a unit that is one item.
    bool add_results(const Unit &unit, Progress &progress, Pause &pause) const {
        for (; progress.num_done < num_results(unit); ++progress.num_done) {
            if (!gather(unit, progress, end_key_of(unit, progress.num_done), pause)) return false;
            const bool has_keys = finish(progress);
            write_result(unit, progress.num_done, has_keys ? progress.scratch.place(0) : Sums());
        }
        return true;
    }

    bool add_pieces(const Item &item, Progress &progress, Pause &pause) const {
        Unit &unit = *item.unit;
        const int64_t size = progress.scratch.sums_size;
        int64_t number = 0;
        bool is_left = false;
        each_piece(item, [&](int64_t, int64_t, int64_t end_key) {
            if (is_left || number++ < progress.num_done) return;
            is_left = !gather(unit, progress, end_key, pause);
            if (is_left) return;
            finish(progress);
            std::copy_n(progress.scratch.sums, size, unit.pieces + (item.first_piece + progress.num_done++) * size);
        });
        if (!is_left && unit.num_items_left.fetch_sub(1) == 1) merge_pieces(unit);  // the last of the unit's to end
        return !is_left;
    }

    static int64_t places_of(const Item &item) {
        if (item.first_key == item.end_key) return 1;
        const Rows &rows = *item.unit->rows;
        return MergeTree::num_places(rows.partition_of(item.first_key), rows.partition_of(item.end_key - 1) + 1);
    }

    // Keys up to end_key, partition by partition; false: it was left before the last.
    bool gather(const Unit &unit, Progress &progress, int64_t end_key, Pause &pause) const {
        const Rows &rows = *unit.rows;
        const Scratch &scratch = progress.scratch;
        const auto merge = merge_in(scratch);
        while (progress.next_key < end_key) {
            const int64_t first = progress.next_key, partition = rows.partition_of(first);
            const int64_t end = std::min(rows.first_key_of(partition + 1), end_key);
            GrowingSums sums(scratch.place(progress.tree.place_for(partition, merge)), scratch.lanes, scratch.num_rows, dim_);
            add_keys(unit, first, end, scratch.queries, sums, scratch.tiles);
            sums.finish(scratch.num_rows);
            progress.next_key = end;
            if (end < end_key && pause.is_asked()) return false;
        }
        return true;
    }
    // What was gathered, into place 0; false: there are no keys.
    bool finish(Progress &progress) const { return progress.tree.finish(merge_in(progress.scratch)); }
    auto merge_in(const Scratch &scratch) const {
        return [&](int64_t place) { scratch.place(place).merge(scratch.place(place + 1), scratch.num_rows, dim_); };
    }

    void merge_pieces(const Unit &unit) const {
        const int64_t num_rows = unit.end_row - unit.first_row, size = Sums::size(num_rows, dim_);
        Sums places[MergeTree::MAX_PLACES];
        MergeTree tree;
        const auto merge = [&](int64_t place) { places[place].merge(places[place + 1], num_rows, dim_); };
        const auto end_result = [&](int64_t result) {
            const bool has_keys = tree.finish(merge);
            write_result(unit, result, has_keys ? places[0] : Sums());
        };
        int64_t result = 0;
        float *piece = unit.pieces;
        for (int64_t i = unit.first_item; i < unit.first_item + unit.num_items; ++i)
            each_piece(items_[i], [&](int64_t partition, int64_t first_key, int64_t) {
                while (first_key >= end_key_of(unit, result)) end_result(result++);
                places[tree.place_for(partition, merge)] = Sums(piece, num_rows);
                piece += size;
            });
        while (result < num_results(unit)) end_result(result++);
    }

    int64_t tile_memory_size(int64_t num_rows) const {
#if defined(HAS_MATRIX_TILES)
        if constexpr (USES_TILES<T>) return KeyTile::memory_size(dim_);
#endif
        return num_rows * (TILE_KEYS + 1) + 2 * TILE_KEYS * dim_;  // scores and decays, widened keys and values
    }

    // The register tiles of a unit: tile i holds rows [first_row_of(i), first_row_of(i + 1)), as evenly as can be.
    struct RowTiles {
        int64_t num_rows, count;
        explicit RowTiles(int64_t n) : num_rows(n), count((n + MAX_ROWS - 1) / MAX_ROWS) {}
        int64_t first_row_of(int64_t i) const { return num_rows * i / count; }
    };

    float base_2_scale() const { return static_cast<float>(call_.scale / LN_2); }

    const T *query(const Unit &unit, int64_t row) const {
        const int64_t token = unit.rows->first_token + row / call_.queries_per_kv_head;
        return static_cast<const T *>(call_.q) + token * call_.q_token_stride + unit.head * call_.q_head_stride +
               row % call_.queries_per_kv_head * call_.q_group_stride;
    }

    // In the order a register tile reads them, scaled for powers of two; for matrix tiles as they are.
    void pack_queries(const Unit &unit, float *queries) const {
        const RowTiles tiles(unit.end_row - unit.first_row);
#if defined(HAS_MATRIX_TILES)
        if constexpr (USES_TILES<T>) {
            const int64_t depth = padded_depth(dim_);
            uint16_t *to = reinterpret_cast<uint16_t *>(queries);
            for (int64_t row = unit.first_row; row < unit.end_row; ++row, to += depth) {
                std::copy_n(query(unit, row), call_.head_dim, to);
                std::fill(to + call_.head_dim, to + depth, 0);
            }
            return;
        }
#endif
        const float scale = base_2_scale();
        for (int64_t i = 0; i < tiles.count; ++i) {
            const int64_t first = tiles.first_row_of(i), count = tiles.first_row_of(i + 1) - first;
            float *to = queries + first * dim_;
            for (int64_t r = 0; r < count; ++r) {
                const T *const q = query(unit, unit.first_row + first + r);
                for (int64_t d = 0; d < call_.head_dim; ++d) to[d * count + r] = to_float(q[d]) * scale;
                for (int64_t d = call_.head_dim; d < dim_; ++d) to[d * count + r] = 0.0f;
            }
        }
    }

    // Online softmax over keys [first_key, end_key), tile by tile.
    void add_keys(
        const Unit &unit, int64_t first_key, int64_t end_key, const float *queries, GrowingSums &sums, float *memory
    ) const {
        const int64_t num_rows = unit.end_row - unit.first_row;
        float *const widened = memory + num_rows * (TILE_KEYS + 1);
        const bool widens = RowTiles(num_rows).count >= MIN_TILES_TO_WIDEN;
        const int64_t num_score_panels = RowTiles(num_rows).count * (TILE_GROUPS / PANEL_GROUPS);
        const Run *const runs = unit.rows->runs, *const end_run = runs + unit.rows->num_runs;
        const Run *run = std::upper_bound(runs, end_run, first_key, [](int64_t key, const Run &r) {
            return key < r.first_key;
        }) - 1;
        KeyGroup<T> groups[TILE_GROUPS];
        for (int64_t key = first_key; key < end_key;) {
            const int64_t tile_start = key;
            int num_groups = 0;
            while (num_groups < TILE_GROUPS && key < end_key) {
                if (run + 1 < end_run && key >= run[1].first_key) ++run;
                const int64_t end_of_run = run + 1 < end_run ? run[1].first_key : end_key;
                const int64_t slot = run->first_slot + key - run->first_key, lane = slot % GROUP;
                const int64_t count = std::min(std::min(end_of_run, end_key) - key, GROUP - lane);
                const int64_t base = unit.head * call_.pool_head_stride + slot / GROUP * GROUP * dim_;
                groups[num_groups++] = {
                    static_cast<const T *>(call_.k_pool) + base, static_cast<const T *>(call_.v_pool) + base, key,
                    static_cast<int>(lane), static_cast<int>(lane + count)
                };
                key += count;
            }
            const bool is_whole = key - tile_start == TILE_KEYS && key <= keys_of(*unit.rows, unit.first_row);
#if defined(HAS_MATRIX_TILES)
            if constexpr (USES_TILES<T>) {
                add_matrix_tile(unit, groups, num_groups, is_whole, key < end_key, queries, sums, memory);
                continue;
            }
#endif
            if constexpr (sizeof(T) == 2) {
                if (widens) {
                    // Widening waits for memory, and the products over a tile last long enough to fetch the next one:
                    // as if it lay behind this one, mostly true.
                    const KeyGroup<T> &last = groups[num_groups - 1];
                    const int64_t tile_bytes = key < end_key ? TILE_KEYS * dim_ * sizeof(T) : 0;
                    Prefetcher next_keys(last.k + GROUP * dim_, tile_bytes, num_score_panels);
                    Prefetcher next_values(last.v + GROUP * dim_, tile_bytes, num_score_panels);
                    KeyGroup<float> wide[TILE_GROUPS];
                    for (int g = 0; g < num_groups; ++g) {
                        float *const k = widened + g * 2 * GROUP * dim_, *const v = k + GROUP * dim_;
                        widen_group(groups[g], k, v, dim_);
                        wide[g] = {k, v, groups[g].first_key, groups[g].first_lane, groups[g].end_lane};
                    }
                    add_tile(unit, wide, num_groups, is_whole, queries, sums, memory, [&] {
                        next_keys.fetch();
                        next_values.fetch();
                    });
                    continue;
                }
            }
            add_tile(unit, groups, num_groups, is_whole, queries, sums, memory, [] {});
        }
    }

#if defined(HAS_MATRIX_TILES)
    void add_matrix_tile(
        const Unit &unit, const KeyGroup<T> *groups, int num_groups, bool is_whole, bool has_next, const float *queries,
        GrowingSums &sums, float *memory
    ) const {
        const int64_t num_rows = unit.end_row - unit.first_row, depth = padded_depth(dim_);
        const int64_t num_pairs = (num_rows + PAIR_ROWS - 1) / PAIR_ROWS;
        // As if the next tile lay behind this one, mostly true.
        const int64_t next_bytes = has_next ? TILE_KEYS * dim_ * sizeof(T) : 0;
        // The steps of both products, or twice as many (Steps): what is fetched has come when the tile is done with.
        const int64_t key_steps = num_pairs * 2 * (depth / TILE_DEPTH);
        const int64_t value_steps = num_pairs * (depth / TILE_DEPTH) * ((num_groups + 1) / 2);
        Prefetcher next_keys(groups[num_groups - 1].k + GROUP * dim_, next_bytes, key_steps);
        Prefetcher next_values(groups[num_groups - 1].v + GROUP * dim_, next_bytes, value_steps);
        KeyTile tile(groups, num_groups, dim_, memory);
        const auto rows_of = [&](int64_t pair) { return std::min(PAIR_ROWS, num_rows - pair * PAIR_ROWS); };
        const auto score = [&](KeyTile::Steps &steps, int64_t pair) {
            steps.score(reinterpret_cast<const uint16_t *>(queries) + pair * PAIR_ROWS * depth, tile.place(pair), next_keys);
        };
        const auto add_values = [&](KeyTile::Steps &steps, int64_t pair) {
            steps.add_values(tile.place(pair), sums.values + pair * PAIR_ROWS * dim_, next_values);
        };
        const auto softmax = [&](int64_t pair, KeyTile::Steps &meanwhile) {
            const int64_t first = pair * PAIR_ROWS, count = rows_of(pair);
            float *const scores = tile.place(pair);
            if (!is_whole)
                for (int64_t r = 0; r < count; ++r)
                    hide(
                        scores + r * TILE_KEYS, groups, num_groups, tile.num_padded(),
                        keys_of(*unit.rows, unit.first_row + first + r)
                    );
            tile.softmax(scores, count, base_2_scale(), sums, first, meanwhile);
        };
        const int64_t num_whole = num_rows / PAIR_ROWS, last_rows = num_rows % PAIR_ROWS;
        const auto add_pairs = [&](int64_t first_pair, int64_t end_pair) {
            KeyTile::Steps steps(tile, rows_of(first_pair));
            score(steps, first_pair);
            steps.finish();
            for (int64_t p = first_pair; p < end_pair; ++p) {
                if (p > first_pair) add_values(steps, p - 1);
                if (p + 1 < end_pair) score(steps, p + 1);
                softmax(p, steps);
                steps.finish();
            }
            add_values(steps, end_pair - 1);
            steps.finish();
        };
        if (num_whole > 0) {
            const TileScope tiles(TILE_ROWS, TILE_ROWS);
            add_pairs(0, num_whole);
        }
        if (last_rows == 0) return;
        const TileScope tiles(
            std::min(last_rows, TILE_ROWS), last_rows > TILE_ROWS ? last_rows - TILE_ROWS : last_rows
        );
        add_pairs(num_whole, num_whole + 1);
    }
#endif

    // fetch: called once for each register tile of scores.
    template <class Stored, class Fetch>
    void add_tile(
        const Unit &unit, KeyGroup<Stored> *groups, int num_groups, bool is_whole, const float *queries,
        GrowingSums &sums, float *memory, const Fetch &fetch
    ) const {
        const int64_t num_rows = unit.end_row - unit.first_row;
        const RowTiles tiles(num_rows);
        float *const scores = memory, *const decay = memory + num_rows * TILE_KEYS;
        // A panel that the groups do not fill repeats the last one; its scores are hidden below.
        int num_padded = num_groups;
        KeyGroup<Stored> padded[TILE_GROUPS];
        std::copy_n(groups, num_groups, padded);
        while (num_padded % PANEL_GROUPS != 0) padded[num_padded++] = groups[num_groups - 1];
        for (int g = 0; g < num_padded; g += PANEL_GROUPS)
            for (int64_t i = 0; i < tiles.count; ++i) {
                const int64_t first = tiles.first_row_of(i), count = tiles.first_row_of(i + 1) - first;
                fetch();
                score_panel_of<Stored>(static_cast<int>(count))(
                    padded + g, queries + first * dim_, dim_, scores + first * TILE_KEYS + g * GROUP
                );
            }
        if (!is_whole)
            for (int64_t r = 0; r < num_rows; ++r)
                hide(
                    scores + r * TILE_KEYS, groups, num_groups, num_padded, keys_of(*unit.rows, unit.first_row + r)
                );
        softmax(scores, num_rows, num_padded * VECS_PER_GROUP, sums, decay);
        const int64_t num_columns = dim_ / WIDTH, num_panels = (num_columns + MAX_COLUMNS - 1) / MAX_COLUMNS;
        for (int64_t p = 0; p < num_panels; ++p) {
            const int64_t first_column = num_columns * p / num_panels;
            const int64_t columns = num_columns * (p + 1) / num_panels - first_column;
            for (int64_t i = 0; i < tiles.count; ++i) {
                const int64_t first = tiles.first_row_of(i), count = tiles.first_row_of(i + 1) - first;
                add_values_of<Stored>(static_cast<int>(count), static_cast<int>(columns))(
                    groups, num_groups, scores + first * TILE_KEYS, decay + first,
                    sums.values + first * dim_ + first_column * WIDTH, dim_, first_column * WIDTH
                );
            }
        }
    }

    // -inf for lanes that are not the sequence's, and for keys at positions from num_keys on.
    template <class Stored>
    static void hide(float *row, const KeyGroup<Stored> *groups, int num_groups, int num_padded, int64_t num_keys) {
        for (int g = 0; g < num_groups; ++g) {
            const KeyGroup<Stored> &group = groups[g];
            const int64_t seen = std::clamp<int64_t>(num_keys - group.first_key, 0, group.end_lane - group.first_lane);
            std::fill(row + g * GROUP, row + g * GROUP + group.first_lane, MINUS_INFINITY);
            std::fill(row + g * GROUP + group.first_lane + seen, row + (g + 1) * GROUP, MINUS_INFINITY);
        }
        std::fill(row + num_groups * GROUP, row + num_padded * GROUP, MINUS_INFINITY);
    }

    // Scores to weights relative to each row's new maximum; decay: what its earlier weights are multiplied by. All
    // maxima first: a row's powers would have to wait for its own.
    static void softmax(float *scores, int64_t num_rows, int num_vecs, GrowingSums &sums, float *decay) {
        for (int64_t r = 0; r < num_rows; ++r) {
            const float *const row = scores + r * TILE_KEYS;
            Vec highest = load(row);
            for (int i = 1; i < num_vecs; ++i) highest = max(highest, load(row + i * WIDTH));
            const float old_max = sums.max[r], new_max = std::max(old_max, reduce_max(highest));
            decay[r] = 1.0f;
            if (new_max != old_max) {
                float lanes[WIDTH];
                store(lanes, exp2_of_nonpositive(splat(old_max - origin_of(new_max))));
                decay[r] = lanes[0];
            }
            sums.max[r] = new_max;
        }
        for (int64_t r = 0; r < num_rows; ++r) {
            float *const row = scores + r * TILE_KEYS, *const lanes = sums.lanes + r * WIDTH;
            const Vec origin = splat(origin_of(sums.max[r]));
            Vec sum = splat(0.0f);
            for (int i = 0; i < num_vecs; ++i) {
                const Vec weight = exp2_of_nonpositive(load(row + i * WIDTH) - origin);
                store(row + i * WIDTH, weight);
                sum = sum + weight;
            }
            store(lanes, fma(load(lanes), splat(decay[r]), sum));
        }
    }

    // A row that has seen no key yet: any finite maximum makes its weights exactly 0.
    static float origin_of(float max) { return max == MINUS_INFINITY ? 0.0f : max; }

    // sums.max null: no row sees a key of this result.
    void write_result(const Unit &unit, int64_t result, const Sums &sums) const {
        const int64_t group = call_.queries_per_kv_head;
        for (int64_t r = 0; r < unit.end_row - unit.first_row; ++r) {
            const int64_t row = unit.first_row + r, head = unit.head * group + row % group;
            if (unit.rows->num_nodes > 0)
                write_node(*unit.rows, row / group, head, result, sums, r);
            else
                write_out(unit.rows->first_token + row / group, head, sums, r);
        }
    }

    void write_out(int64_t token, int64_t head, const Sums &sums, int64_t r) const {
        const int64_t index = token * num_heads(call_) + head;
        T *const out = static_cast<T *>(call_.out) + index * call_.head_dim;
        float *const lse = call_.lse == nullptr ? nullptr : call_.lse + index;
        const float *const sink = call_.sinks == nullptr ? nullptr : call_.sinks + head;
        if (sums.max != nullptr) return write_row(sums, r, dim_, call_.head_dim, sink, out, lse);
        std::fill_n(out, call_.head_dim, 0);
        if (lse != nullptr) *lse = MINUS_INFINITY;
    }

    void write_node(const Rows &rows, int64_t token, int64_t head, int64_t node, const Sums &sums, int64_t r) const {
        const int64_t head_dim = call_.head_dim, index = rows.first_result + token * rows.num_nodes + node;
        float *const to = call_.nodes + index * node_size(call_) + head * (head_dim + 2);
        const bool has_keys = sums.max != nullptr;
        has_keys ? std::copy_n(sums.values + r * dim_, head_dim, to) : std::fill_n(to, head_dim, 0.0f);
        to[head_dim] = has_keys ? sums.max[r] : MINUS_INFINITY;
        to[head_dim + 1] = has_keys ? sums.total[r] : 0.0f;
    }

    const Call &call_;
    const int64_t dim_;
    std::vector<Unit> units_;
    std::vector<Item> items_;
    std::mutex left_lock_;
    std::map<int64_t, Progress> left_;  // items that were begun, by number
};

}  // namespace

extern "C" int medha_attend(const Call *call) {
    return is_out_of_memory([&] { call->is_bf16 ? Work<uint16_t>(*call).run() : Work<float>(*call).run(); });
}

// 2^x of count floats, count a multiple of 16; for the test of its accuracy.
extern "C" void medha_exp2(const float *x, float *y, int64_t count) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    for (int64_t i = 0; i < count; i += WIDTH) store(y + i, exp2_of_nonpositive(load(x + i)));
    _mm_setcsr(before);
}
