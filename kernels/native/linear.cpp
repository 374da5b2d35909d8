// Linear layers with bf16, int8 or int4 weights and fp32 arithmetic. Where there are matrix tiles, linear_tiles.h
// multiplies, where there are bf16 dot products alone, linear_pairs.h.
//
// out [T, O] = in [T, I] . weight [O, I]^T + bias [O], in, bias and out in bf16; an int8 weight is multiplied by its
// output's scale. The weight lies packed, bf16 as [O/64][I/2][64][2], int8 as [O/64][I][64], int4 as [O/64][I/32] groups
// with scales of their own: decodes read it as it is, half to a seventh of the bytes of fp32 and in one ascending run;
// more rows widen each block of it once.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "calls.h"
#include "linear_output.h"
#include "linear_pairs.h"
#include "linear_tiles.h"
#include "parallel_for.h"
#include "prefetcher.h"
#include "simd.h"
#include "slices.h"
#include "spin_pool.h"
#include "storage.h"
#include "sums.h"

namespace {

constexpr int64_t PANEL = MAX_COLUMNS * WIDTH;  // outputs of a register tile
static_assert(PACKED % PANEL == 0, "a register tile lies in one pack");
constexpr int64_t AHEAD = 2048;                 // bytes: what decodes fetch beforehand
constexpr int64_t DEPTH = 256;      // inputs of a widened block: 64 KiB with 64 outputs, in L2
static_assert(DEPTH % WIDTH == 0, "inputs are packed by vectors");
constexpr int MAX_ROWS = 6;         // of a register tile
constexpr int64_t MAX_ROWS_OF_ITEM = 96;
constexpr int MAX_ROWS_UNWIDENED = 2 * MAX_ROWS;  // of a register tile of half the width
constexpr int columns_of(int64_t num_rows) { return num_rows <= MAX_ROWS ? MAX_COLUMNS : MAX_COLUMNS / 2; }

// Weights of inputs d and d + 1 (d even), for the vector of outputs that begins at output o of a pack.
inline const uint16_t *place(const uint16_t *pack, int64_t d, int64_t o) { return pack + d * PACKED + 2 * o; }
inline const int8_t *place(const int8_t *pack, int64_t d, int64_t o) { return pack + d * PACKED + o; }
inline void load_two(const uint16_t *at, Vec &first, Vec &second) { load_pairs(at, first, second); }
inline void load_two(const int8_t *at, Vec &first, Vec &second) {
    first = load_bytes(at);
    second = load_bytes(at + PACKED);
}
template <class W>
constexpr int64_t BYTES_OF_VEC = WIDTH * (IS_BF16<W> ? 4 : 1);  // that lie together: bf16 has both inputs there
inline void fetch_two(const uint16_t *at) { __builtin_prefetch(at + AHEAD / 2); }
inline void fetch_two(const int8_t *at) {
    __builtin_prefetch(at + AHEAD);
    __builtin_prefetch(at + PACKED + AHEAD);
}
inline void fetch_two(Int4Place at) { __builtin_prefetch(at.pairs + AHEAD); }

// Rows of a tile lie side by side, WIDTH inputs of each at a time: in [depth / WIDTH][R][WIDTH].
template <int R>
void add_products(const float *weights, const float *in, int64_t depth, float *sums, Prefetcher &next) {
    Vec sum[R][MAX_COLUMNS];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < MAX_COLUMNS; ++c) sum[r][c] = load(sums + r * PANEL + c * WIDTH);
    for (; depth > 0; depth -= WIDTH, in += R * WIDTH) {
        const int64_t count = std::min<int64_t>(WIDTH, depth);
        next.fetch();
        for (int64_t d = 0; d < count; ++d, weights += PANEL) {
            Vec column[MAX_COLUMNS];
            for (int c = 0; c < MAX_COLUMNS; ++c) column[c] = load(weights + c * WIDTH);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const Vec x = splat(in[r * WIDTH + d]);
                for (int c = 0; c < MAX_COLUMNS; ++c) sum[r][c] = fma(x, column[c], sum[r][c]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < MAX_COLUMNS; ++c) store(sums + r * PANEL + c * WIDTH, sum[r][c]);
}

// Weights as they lie, C vectors of outputs wide from output o of a pack; sums [R][C vectors]. The same products in the
// same order as add_products. More rows than a tile of full width holds get one of half the width: weights are read and
// widened once.
template <class W, int R, int C>
void multiply_packed(const W *pack, int64_t o, const float *in, int64_t depth, float *sums) {
    Vec sum[R][C] = {};
    for (int64_t start = 0; start < depth; start += WIDTH, in += R * WIDTH) {
        const int64_t count = std::min<int64_t>(WIDTH, depth - start);
        for (int64_t d = 0; d < count; d += 2) {
            Vec even[C], odd[C];
            for (int c = 0; c < C; ++c) {
                const auto at = place(pack, start + d, o + c * WIDTH);
                load_two(at, even[c], odd[c]);
                if (c * BYTES_OF_VEC<W> % 64 == 0) fetch_two(at);  // once a line
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const Vec x = splat(in[r * WIDTH + d]);
                for (int c = 0; c < C; ++c) sum[r][c] = fma(x, even[c], sum[r][c]);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const Vec x = splat(in[r * WIDTH + d + 1]);
                for (int c = 0; c < C; ++c) sum[r][c] = fma(x, odd[c], sum[r][c]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(sums + r * C * WIDTH + c * WIDTH, sum[r][c]);
}

template <class W>
using MultiplyPacked = void (*)(const W *, int64_t, const float *, int64_t, float *);
template <class W, int... R>
constexpr MultiplyPacked<W> multiply_packed_of(int num_rows, std::integer_sequence<int, R...>) {
    constexpr MultiplyPacked<W> all[] = {multiply_packed<W, R + 1, columns_of(R + 1)>...};
    return all[num_rows - 1];
}

using AddProducts = void (*)(const float *, const float *, int64_t, float *, Prefetcher &);
constexpr AddProducts ADD_PRODUCTS[] = {add_products<1>, add_products<2>, add_products<3>,
                                        add_products<4>, add_products<5>, add_products<6>};

// W: what a weight is stored in.
template <class W>
class Linear {
  public:
    explicit Linear(const LinearCall &call)
        : call_(call),
          slices_(call),
          depth_(slices_.whole_depth),
          num_tiles_(
              call.num_rows <= MAX_ROWS_UNWIDENED ? call.num_rows > 0 : (call.num_rows + MAX_ROWS - 1) / MAX_ROWS
          ) {}

    // As in TiledLinear. Below so many multiplications a second thread costs more than it saves (some 50 us of work).
    static constexpr int64_t MIN_PARALLEL_WORK = 1 << 21;
    static constexpr int64_t MIN_PARALLEL_INPUTS = 1 << 16;
    using Input = float;

    int64_t work() const { return call_.num_rows * slices_.size() * call_.num_outputs; }

    int64_t num_copied_inputs() const { return call_.num_rows * slices_.size(); }
    int64_t num_copies() const { return num_tiles_; }
    void copy_to(float *memory) { packed_ = memory; }
    // As add_products reads them; zeros fill up what is not there.
    void copy(int64_t tile) const {
        const int64_t first = first_row_of(tile), count = first_row_of(tile + 1) - first;
        float *const to = packed_ + first * slices_.size();
        for (int64_t r = 0; r < count; ++r) {
            const uint16_t *in = call_.in + (first + r) * call_.num_inputs + slices_.first_slice * slices_.num_inputs;
            float *of_row = to + r * WIDTH;
            for (int64_t s = 0; s < slices_.num_slices; ++s, in += slices_.num_inputs)
                for (int64_t d = 0; d < slices_.depth; d += WIDTH, of_row += WIDTH * count)
                    store(of_row, load_first(in + d, slices_.num_inputs - d));
        }
    }

    int64_t cut(int64_t num_threads) {
        num_threads_ = num_threads;
        if (call_.num_rows == 0) return num_items_ = 0;
        if (call_.num_rows <= MAX_ROWS_UNWIDENED) {
            // Several panels an item: a run of memory that the processor's prefetching follows.
            width_ = columns_of(call_.num_rows) * WIDTH;
            num_columns_ = (call_.num_outputs + width_ - 1) / width_;
            return num_items_ = std::min(num_columns_, 4 * num_threads);
        }
        num_blocks_ = (call_.num_rows + MAX_ROWS_OF_ITEM - 1) / MAX_ROWS_OF_ITEM;
        return num_items_ = (call_.num_outputs + PANEL - 1) / PANEL * num_blocks_;
    }

    void run(int64_t i) const {
        if (call_.num_rows <= MAX_ROWS_UNWIDENED) {
            for (int64_t c = num_columns_ * i / num_items_; c < num_columns_ * (i + 1) / num_items_; ++c)
                multiply(c * width_, width_);
            return;
        }
        const int64_t block = i % num_blocks_, num_panels = num_items_ / num_blocks_;
        // The item that this thread takes next, if all take as long.
        const int64_t next = i + num_threads_ < num_items_ ? (i + num_threads_) / num_blocks_ : num_panels;
        multiply_widened(
            i / num_blocks_, num_tiles_ * block / num_blocks_, num_tiles_ * (block + 1) / num_blocks_,
            next < num_panels ? pack_of(next * PANEL) : nullptr
        );
    }

  private:
    int64_t first_row_of(int64_t tile) const { return call_.num_rows * tile / num_tiles_; }

    const W *pack_of(int64_t output) const {
        return advance(static_cast<const W *>(call_.weight.values), (output / PACKED * depth_ + slices_.first()) * PACKED);
    }

    // All rows, outputs [first, first + width).
    void multiply(int64_t first, int64_t width) const {
        constexpr int64_t SIZE = MAX_ROWS * PANEL;
        alignas(64) float sums[SIZE], tree[MAX_TREE_DEPTH * SIZE];
        const int num_rows = static_cast<int>(call_.num_rows);
        const auto multiply_rows =
            multiply_packed_of<W>(num_rows, std::make_integer_sequence<int, MAX_ROWS_UNWIDENED>());
        add_up_slices(0, slices_.num_slices, sums, num_rows * width, tree, [&](int64_t slice, float *to) {
            const int64_t d = slice * slices_.depth;
            multiply_rows(advance(pack_of(first), d * PACKED), first % PACKED, packed_ + d * num_rows, slices_.depth, to);
        });
        for (int64_t r = 0; r < num_rows; ++r) write_outputs(call_, r, first, width, sums + r * width);
    }

    // after: weights that will probably be multiplied next, or null.
    void multiply_widened(int64_t panel, int64_t first_tile, int64_t end_tile, const W *after) const {
        static thread_local Buffer memory;
        const int64_t first_row = first_row_of(first_tile), num_rows = first_row_of(end_tile) - first_row;
        const int64_t size = num_rows * PANEL;
        float *const widened = memory.at_least<float>((1 + MAX_TREE_DEPTH) * size + DEPTH * PANEL);
        float *const sums = widened + DEPTH * PANEL;
        add_up_slices(0, slices_.num_slices, sums, size, sums + size, [&](int64_t slice, float *to) {
            multiply_slice(panel, slice, first_tile, end_tile, after, widened, to);
        });
        for (int64_t r = 0; r < num_rows; ++r) write_outputs(call_, first_row + r, panel * PANEL, PANEL, sums + r * PANEL);
    }

    void multiply_slice(
        int64_t panel, int64_t slice, int64_t first_tile, int64_t end_tile, const W *after, float *widened, float *sums
    ) const {
        const int64_t first_row = first_row_of(first_tile), num_rows = first_row_of(end_tile) - first_row;
        const int64_t first = slice * slices_.depth, end = first + slices_.depth, num_inputs = slices_.size();
        std::fill_n(sums, num_rows * PANEL, 0.0f);
        for (int64_t start = first; start < end; start += DEPTH) {
            const int64_t depth = std::min(DEPTH, end - start);
            const W *const block = advance(pack_of(panel * PANEL), start * PACKED);
            widen(block, panel * PANEL % PACKED, widened, depth);
            const int64_t num_left = num_inputs - start - depth;
            const int64_t next_depth = num_left > 0 ? std::min(DEPTH, num_left) : after != nullptr ? depth : 0;
            const int64_t num_fetches = (end_tile - first_tile) * ((depth + WIDTH - 1) / WIDTH);
            Prefetcher next(
                num_left > 0 ? advance(block, depth * PACKED) : after, bytes_of<W>(next_depth * PACKED), num_fetches
            );
            for (int64_t tile = first_tile; tile < end_tile; ++tile) {
                const int64_t row = first_row_of(tile), count = first_row_of(tile + 1) - row;
                const float *const in = packed_ + row * num_inputs + start * count;
                ADD_PRODUCTS[count - 1](widened, in, depth, sums + (row - first_row) * PANEL, next);
            }
        }
    }

    static void widen(const W *pack, int64_t o, float *to, int64_t depth) {
        for (int64_t d = 0; d < depth; d += 2)
            for (int c = 0; c < MAX_COLUMNS; ++c) {
                Vec even, odd;
                load_two(place(pack, d, o + c * WIDTH), even, odd);
                store(to + d * PANEL + c * WIDTH, even);
                store(to + (d + 1) * PANEL + c * WIDTH, odd);
            }
    }

    const LinearCall &call_;
    const SlicedInputs slices_;
    const int64_t depth_;
    const int64_t num_tiles_;
    float *packed_ = nullptr;
    int64_t num_threads_ = 1, num_items_ = 0, width_ = 0, num_columns_ = 0, num_blocks_ = 0;
};

// One job of all inputs' copies, then one of all products: of several small layers each thread has enough to do.
template <class Kernel>
void run_all(const LinearCall *calls, int64_t count) {
    static thread_local PerDepth<std::vector<Kernel>> kernels_of_thread;
    static thread_local PerDepth<std::vector<int64_t>> ends_of_thread;
    static thread_local PerDepth<Buffer> input_memory;
    std::vector<Kernel> &kernels = kernels_of_thread.now();
    std::vector<int64_t> &ends = ends_of_thread.now();  // of each layer's items among all
    kernels.clear();
    ends.assign(count, 0);
    int64_t work = 0, num_inputs = 0, num_items = 0;
    for (int64_t c = 0; c < count; ++c) {
        kernels.emplace_back(calls[c]);
        work += kernels[c].work();
        num_inputs += kernels[c].num_copied_inputs();
    }
    const auto run_items = [&](int64_t num_threads, const auto &run) {
        parallel_for(calls[0].run_parallel, num_threads, num_items, [&](int64_t item) {
            const int64_t c = std::upper_bound(ends.begin(), ends.end(), item) - ends.begin();
            run(kernels[c], c == 0 ? item : item - ends[c - 1]);
        });
    };
    const auto threads_for = [&](int64_t amount, int64_t least) {
        return useful_threads(calls[0].run_parallel, calls[0].num_threads, amount, least);
    };
    typename Kernel::Input *inputs = input_memory.now().at_least<typename Kernel::Input>(num_inputs);
    for (int64_t c = 0; c < count; ++c) {
        kernels[c].copy_to(inputs);
        inputs += kernels[c].num_copied_inputs();
        ends[c] = num_items += kernels[c].num_copies();
    }
    if (num_items > 0)
        run_items(threads_for(num_inputs, Kernel::MIN_PARALLEL_INPUTS), [](const Kernel &kernel, int64_t i) { kernel.copy(i); });
    const int64_t num_threads = threads_for(work, Kernel::MIN_PARALLEL_WORK);
    num_items = 0;
    for (int64_t c = 0; c < count; ++c) ends[c] = num_items += kernels[c].cut(num_threads);
    run_items(num_threads, [](const Kernel &kernel, int64_t i) { kernel.run(i); });
}

}  // namespace

#if defined(HAS_MATRIX_TILES)
bool fuses_gate(int64_t ffn_size) { return ffn_size % PACKED == 0; }
template <class W>
using BestLinear = TiledLinear<W>;
#elif defined(HAS_PAIRS)
bool fuses_gate(int64_t ffn_size) { return ffn_size % PACKED == 0; }
template <class W>
using BestLinear = PairLinear<W>;
#else
bool fuses_gate(int64_t) { return false; }
template <class W>
using BestLinear = Linear<W>;
#endif

void multiply_all(const LinearCall *calls, int64_t count) {
    if (count == 0) return;
    switch (calls->weight.kind) {
        case BF16_WEIGHT: return run_all<BestLinear<uint16_t>>(calls, count);
        case INT8_WEIGHT: return run_all<BestLinear<int8_t>>(calls, count);
        case INT4_WEIGHT: return run_all<BestLinear<Int4Group>>(calls, count);
    }
}

extern "C" int medha_finish(const LinearCall *call, const float *sums) {
    for (int64_t r = 0; r < call->num_rows; ++r)
        for (int64_t o = 0; o < call->num_outputs; o += PACKED) {
            alignas(64) float padded[PACKED] = {};
            std::copy_n(sums + r * call->num_outputs + o, std::min(PACKED, call->num_outputs - o), padded);
            write_outputs(*call, r, o, PACKED, padded);
        }
    return 0;
}

extern "C" int medha_linear(const LinearCall *call) {
    return is_out_of_memory([&] { multiply_all(call, 1); });
}
