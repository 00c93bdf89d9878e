// y = x W^T + b over packed panels, any number of rows: streams the weights once for a few rows (decode), and works in
// cache-sized blocks for many (prefill). Rows are cut into tiles of at most MAX_ROWS; the products of one output are
// always summed in the order of K, so a row of y is bit-identical whatever rows stand beside it.
#include <algorithm>

#include "linear_kinds.h"
#include "parallel.h"

namespace {
constexpr long SLICE_BYTES = 128 * 1024;  // a panel's slice of K: stays in L2 while all tiles of a block use it
constexpr long BLOCK_BYTES = 384 * 1024;  // activations of a block of rows: stay in L2 over a chunk of panels

// Rows [0, m) cut into tiles whose heights differ by at most one.
struct Tiling {
    long m, num_tiles;
    long start(long tile) const { return tile * m / num_tiles; }
    int height(long tile) const { return int(start(tile + 1) - start(tile)); }
};

struct Job {
    const Linear& linear;
    const void* x;
    void* y;
    int x_dtype, y_dtype, threads;
    int64_t y_stride;
    Tiling tiling;
    long num_panels;
    long units = 0;
    long slice = 0, block = 0, chunk = 0;  // units of K per slice, tiles per block, panels handed to a thread at once
    char* tiles = nullptr;                 // packed activations
    float* partials = nullptr;             // per thread, between slices: [panels of a chunk][rows of a block][PANEL]
    long partials_per_thread = 0;
};

template <class K>
void plan(Job& job) {
    bool stream = job.tiling.num_tiles <= 2;
    long num_slices = stream ? 1 : (job.units * K::PANEL_BYTES + SLICE_BYTES - 1) / SLICE_BYTES;
    job.slice = (job.units + num_slices - 1) / num_slices;
    job.block = stream ? 2 : std::max(2L, BLOCK_BYTES / long(job.slice * K::ROW_BYTES * vec::MAX_ROWS));
    job.chunk = std::clamp(job.num_panels / (job.threads * 8), 1L, stream ? 16L : 8L);
    job.partials_per_thread = num_slices > 1 ? job.block * vec::MAX_ROWS * job.chunk * PANEL : 0;
}

void store_row(const Job& job, long row, long channel, vec::F value) {
    long left = job.linear.n - channel, at = row * job.y_stride + channel;
    if (left <= 0) return;
    int lanes = int(std::min<long>(left, vec::LANES));
    if (job.y_dtype == FLOAT32)
        vec::store_some((float*)job.y + at, value, lanes);
    else
        vec::store_some((bf16*)job.y + at, value, lanes);
}

// R rows from `row` on times units [from, to) of one panel.
template <class K, int R>
__attribute__((noinline)) void multiply(const Job& job, long row, long panel, long from, long to, float* partial,
                                        Prefetch prefetch) {
    const float* bias = job.linear.bias ? job.linear.bias + panel * PANEL : nullptr;
    vec::F c[R][2];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++)
            c[r][v] = from ? vec::load(partial + r * PANEL + v * vec::LANES)
                           : bias ? vec::load(bias + v * vec::LANES) : vec::zero();
    const char* weights = job.linear.weights + (panel * job.units + from) * K::PANEL_BYTES;
    const char* activations = job.tiles + (row * job.units + from * R) * K::ROW_BYTES;
    K::template accumulate<R>(activations, weights, to - from, c, prefetch);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++)
            if (to < job.units)
                vec::store(partial + r * PANEL + v * vec::LANES, c[r][v]);
            else
                store_row(job, row + r, panel * PANEL + v * vec::LANES, c[r][v]);
}

// A lone tile prefetches 4 KiB ahead in its own stream; of several, the first two fetch the next panel between them.
Prefetch plan_prefetch(const char* slice, long slice_bytes, long panel_bytes, long tile, bool alone) {
    if (alone) return {slice + 4096, 128};
    return tile < 2 ? Prefetch{slice + panel_bytes + tile * slice_bytes / 2, 64} : Prefetch{slice, 0};
}

template <class K>
void multiply_block(const Job& job, long first_tile, long first_panel, float* partials) {
    long last_tile = std::min(first_tile + job.block, job.tiling.num_tiles);
    long last_panel = std::min(first_panel + job.chunk, job.num_panels);
    long first_row = job.tiling.start(first_tile), num_rows = job.tiling.start(last_tile) - first_row;
    for (long from = 0; from < job.units; from += job.slice) {
        long to = std::min(from + job.slice, job.units);
        for (long panel = first_panel; panel < last_panel; panel++)
            for (long tile = first_tile; tile < last_tile; tile++) {
                const char* slice = job.linear.weights + (panel * job.units + from) * K::PANEL_BYTES;
                Prefetch prefetch = plan_prefetch(slice, (to - from) * K::PANEL_BYTES, job.units * K::PANEL_BYTES,
                                                  tile - first_tile, job.tiling.num_tiles == 1);
                long row = job.tiling.start(tile);
                float* partial = partials + ((panel - first_panel) * num_rows + row - first_row) * PANEL;
                with_rows(job.tiling.height(tile), [&](auto height) {
                    multiply<K, height.value>(job, row, panel, from, to, partial, prefetch);
                });
            }
    }
}

template <class K>
void pack_tile(const Job& job, long tile) {
    long row = job.tiling.start(tile), k = job.linear.k;
    int height = job.tiling.height(tile);
    char* out = job.tiles + row * job.units * K::ROW_BYTES;
    if (job.x_dtype == FLOAT32)
        K::pack_tile((const float*)job.x + row * k, k, height, out);
    else
        K::pack_tile((const bf16*)job.x + row * k, k, height, out);
}

template <class K>
void run(const Job& job) {
    if (job.tiles != job.x)
        parallel_for(job.threads, job.tiling.num_tiles, 1, [&](long tile, int) { pack_tile<K>(job, tile); });
    long num_blocks = (job.tiling.num_tiles + job.block - 1) / job.block;
    long num_chunks = (job.num_panels + job.chunk - 1) / job.chunk;
    parallel_for(job.threads, num_blocks * num_chunks, 1, [&](long item, int thread) {
        float* partials = job.partials + job.partials_per_thread * thread;
        multiply_block<K>(job, item / num_chunks * job.block, item % num_chunks * job.chunk, partials);
    });
}

template <class K>
int plan_and_run(Job& job) {
    job.units = job.linear.k / K::UNIT;
    plan<K>(job);
    constexpr bool DENSE = K::ROW_BYTES == 4;
    bool in_place = DENSE && job.tiling.m == 1;  // one dense row already is its own tile
    long packed = in_place ? 0 : (job.tiling.m * job.units * K::ROW_BYTES + 63) / 64 * 64;
    Scratch scratch(packed + job.partials_per_thread * job.threads * sizeof(float));
    if (!in_place && !scratch.data) return OUT_OF_MEMORY;
    job.tiles = in_place ? (char*)job.x : (char*)scratch.data;
    job.partials = (float*)((char*)scratch.data + packed);
    run<K>(job);
    return OK;
}
}  // namespace

EXPORT int blade_linear(const LinearCall* call) {
    auto& c = *call;
    Job job{*c.linear, c.x, c.y, c.x_dtype, c.y_dtype, c.threads, c.y_stride,
            {c.m, (c.m + vec::MAX_ROWS - 1) / vec::MAX_ROWS}, (c.linear->n + PANEL - 1) / PANEL};
    switch (c.linear->kind) {
        case DENSE_F32: return plan_and_run<Dense<float>>(job);
        case DENSE_BF16: return plan_and_run<Dense<bf16>>(job);
        case GROUPED_INT8: return plan_and_run<Grouped<8>>(job);
        default: return plan_and_run<Grouped<4>>(job);
    }
}
