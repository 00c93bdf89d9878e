// y = x W^T + b over packed panels, any number of rows: streams the weights once for a few rows (decode), and works in
// cache-sized blocks for many (prefill). Rows are cut into tiles, K into slices that are unpacked once for all tiles of
// a block; the products of one output are always summed in the order of K, so a row of y is bit-identical whatever rows
// stand beside it.
#include "activations.h"
#include "amx_tile.h"
#include "linear_job.h"
#include "parallel.h"
#include "stream_nested.h"
#include "stream_tile.h"
#include "unpack.h"

namespace {
constexpr long FEW_TILES = 4;               // up to here the weights are read once, in short slices
constexpr long FEW_BYTES = 4 * 1024;        // of such a slice
constexpr long FEW_AHEAD = 2 * 1024;        // bytes between what is read and what is prefetched
constexpr long FEW_ITEMS = 4;               // of a thread, at least, for others to help it
constexpr long SLICE_BYTES = 16 * 1024;     // of others: stays in L1 while the tiles of a block use it
constexpr long BLOCK_BYTES = 192 * 1024;    // activations of a block of rows: stay in L2 over a chunk of panels
static_assert(SLICE_BYTES % (4 * PANEL * AMX_WORDS) == 0, "slices of bf16 end where AMX's sums of products do");
constexpr long MOST_CHUNK = 8;              // panels
constexpr long PACKED_TOGETHER = 16 * 1024;  // activations of so few tiles that threads share one: fewer are not worth it
constexpr long ITEMS = 8;                   // chunks times blocks of a thread, at least, for others to help it

template <int R>
struct F32Tile {
    static constexpr Tile tile = dense_tile<F32, R>;
};
template <int R>
struct Float8Tile {
    static constexpr Tile tile = float8_tile<R>;
};
template <int R>
struct BF16Tile {
    static constexpr Tile tile = dense_tile<BF16, R>;
};
template <int BITS>
struct ByteTile {
    template <int R>
    struct Rows {
        static constexpr Tile tile = byte_tile<BITS, R>;
    };
};

Tile find_tile(const Layout& layout, int rows) {
    int bits = layout.format.bits;
    Tile tile;
    if (layout.format.coding == FLOATS) return tile_of<Float8Tile, Tile, TALL_TILE_ROWS>(rows);
    if (layout.floats) return tile_of<F32Tile, Tile, TALL_TILE_ROWS>(rows);
    if constexpr (!WIDENS_BF16 && !AMX)
        if (bits == 16) return tile_of<BF16Tile, Tile>(rows);
    with_bits(layout.width, [&](auto b) { tile = tile_of<ByteTile<b>::template Rows, Tile>(rows); });
    return tile;
}

template <int R>
struct StreamBF16 {
    static constexpr StreamTile tile = stream_bf16<R>;
};
template <int R>
struct StreamFloat8 {
    static constexpr StreamTile tile = stream_float8<R>;
};
template <int R>
struct StreamNested {
    static constexpr StreamTile tile = stream_nested<R>;
};
template <class P>
struct StreamGroups {
    template <int R>
    struct Rows {
        static constexpr StreamTile tile = stream_groups<P, R>;
    };
};

// Whether rows meet these weights in AMX's registers: bf16 always, and integers where they are not streamed.
bool meets_amx(const Layout& layout, bool stream) { return AMX && !layout.floats && (layout.format.bits == 16 || !stream); }

// How many rows, at most, take weights straight from memory.
int stream_rows(const Layout& layout) {
    if (layout.format.bits == 32) return 0;
    return meets_amx(layout, true) ? AMX_ROWS : STREAM_ROWS;
}

// How so few rows do.
StreamTile find_stream(const Layout& layout, int rows) {
    int bits = layout.format.bits;
    if (bits == 16) return tile_of<StreamBF16, StreamTile, STREAM_ROWS>(rows);
    if (layout.floats) return tile_of<StreamFloat8, StreamTile, STREAM_ROWS>(rows);
    if (layout.format.coding == NESTED) return tile_of<StreamNested, StreamTile, STREAM_ROWS>(rows);
    StreamTile tile;
    with_packing(layout, [&](auto p) {
        tile = tile_of<StreamGroups<decltype(p)>::template Rows, StreamTile, STREAM_ROWS>(rows);
    });
    return tile;
}

int words_per_step(int width) { return width == 8 ? ByteDot<8>::WORDS : 1; }

// Parts as even as they get of which none is more than `most`.
long even(long count, long most) {
    long parts = (count + most - 1) / most;
    return (count + parts - 1) / parts;
}

// How many panels are read side by side: fewer where their units are long, and one where slices of it are unpacked.
long places(const Layout& layout, bool stream, long m) {
    bool long_units = layout.format.coding == NESTED ? m <= LATE_ROWS : layout.unit_bytes > STREAM_RUN;
    return !stream ? 1 : long_units ? 2 : STREAM_PANELS;
}

// Rows that make a single tile are streamed; tall tiles use a weight that has been widened for more rows.
int most_rows_of(const Layout& layout, long m) {
    if (m <= stream_rows(layout)) return stream_rows(layout);
    if (meets_amx(layout, false)) return AMX_ROWS;
    bool widened = layout.floats && layout.format.bits < 32;
    return widened && m > FEW_TILES * MAX_TILE_ROWS ? TALL_TILE_ROWS : MAX_TILE_ROWS;
}

// Whether each tile unpacks the weights for itself, which for several tiles pays where these are of few rows and unpacking
// costs little.
bool is_streamed(const Layout& layout, const Tiling& tiling) {
    int bits = layout.format.bits;
    return tiling.height(tiling.num_tiles - 1) <= stream_rows(layout) &&
           (tiling.num_tiles == 1 || (!AMX && STREAM_ROWS <= MAX_TILE_ROWS && (bits == 4 || layout.floats)));
}
}  // namespace

Job::Job(const LinearCall& c)
    : call(c), linear(*c.linear), layout(linear.format, linear.k),
      most_rows(most_rows_of(layout, c.m)),
      tiling{c.m, (c.m + most_rows - 1) / most_rows, meets_amx(layout, false) ? AMX_ROWS / 2 : 1},
      num_panels((linear.n + PANEL - 1) / PANEL),
      few(tiling.num_tiles <= FEW_TILES), stream(few && is_streamed(layout, tiling)), amx(meets_amx(layout, stream)),
      cut(c.threads, num_panels, std::clamp(num_panels / (c.threads * FEW_ITEMS), 1L, places(layout, stream, c.m))) {
    int bits = linear.format.bits;
    unpacked = 4L * PANEL * (layout.floats ? layout.columns : layout.steps);
    row_bytes = layout.floats ? 4 * layout.columns
                : bits == 16  ? 4
                              : activation_bytes(layout.steps, amx ? 1 : words_per_step(layout.width), layout.groups);
    long slice_bytes = few && !(amx && bits == 16) ? FEW_BYTES : SLICE_BYTES;
    slice = std::clamp(slice_bytes / (stream ? layout.unit_bytes : unpacked), 1L, layout.units);
    if (stream && tiling.num_tiles == 1) slice = layout.units;
    long part = slice * row_bytes * most_rows;  // of a tile's activations
    block = few ? tiling.num_tiles : even(tiling.num_tiles, std::clamp(BLOCK_BYTES / part, 1L, tiling.num_tiles));
    chunk = few ? cut.runs : std::clamp(num_blocks() * num_panels / (c.threads * ITEMS), 1L, MOST_CHUNK);
    per_thread = aligned(sums_bytes() + (stream ? 0 : slice * (unpacked + 8L * PANEL)));
}

namespace {
// Units [from, to) of one panel, unpacked into the thread's scratch where they cannot be used in place.
Slice unpack(const Job& job, long panel, long from, long to, char* scratch) {
    const Layout& layout = job.layout;
    const char* packed = job.panel(panel);
    int bits = layout.format.bits;
    Slice slice{packed + layout.offset_of(from), layout.unit_bytes, nullptr, nullptr, to - from, layout.steps,
                layout.groups, layout.columns};
    float* scales = (float*)(scratch + job.slice * job.unpacked);
    if (layout.format.coding == FLOATS) {
        for (long u = from; u < to; u++) {
            const char* unit = packed + layout.offset_of(u);
            widen_float8(layout, unit, (float*)(scratch + (u - from) * job.unpacked));
            memcpy(scales + (u - from) * PANEL, unit, 4 * PANEL);
        }
        slice.words = scratch, slice.stride = job.unpacked, slice.scales = scales;
        return slice;
    }
    if (layout.floats && bits == 16) {
        widen_bf16((const uint32_t*)slice.words, to - from, (float*)scratch);
        slice.words = scratch;
        slice.units *= layout.columns;
    }
    if (layout.floats || bits == 16) return slice;
    bool centred = layout.format.offsets == NONE || layout.format.coding == NESTED;
    float* offsets = centred ? nullptr : scales + job.slice * PANEL;
    BlockUnits block;
    for (long u = from; u < to; u++) {
        if (u == from || u % layout.block == 0) block.set(layout.format, packed + layout.header_of(u));
        unpack_scales(layout, packed + layout.offset_of(u), block, scales + (u - from) * PANEL,
                      offsets + (u - from) * PANEL);
    }
    slice.scales = scales, slice.offsets = offsets;
    slice.words += layout.quants;  // of 8 bits, in place
    if (bits == 8) return slice;
    for (long u = from; u < to; u++)
        unpack_unit(layout, packed + layout.offset_of(u), (uint32_t*)(scratch + (u - from) * job.unpacked));
    slice.words = scratch, slice.stride = job.unpacked;
    return slice;
}

void start_sums(const Job& job, long panel, int rows, float* c) {
    if (!job.linear.bias)
        memset(c, 0, rows * PANEL * sizeof(float));
    else
        for (int r = 0; r < rows; r++) memcpy(c + r * PANEL, job.linear.bias + panel * PANEL, PANEL * sizeof(float));
}

template <class Y>
void store_as(const Job& job, long panel, long row, int rows, const float* c) {
    for (int r = 0; r < rows; r++) {
        Y* y = (Y*)job.call.y + (row + r) * job.call.y_stride + panel * PANEL;
        for (int v = 0; v < PANEL; v += vec::LANES)
            if (long left = job.linear.n - panel * PANEL - v; left > 0)
                vec::store_some(y + v, vec::load(c + r * PANEL + v), int(std::min<long>(left, vec::LANES)));
    }
}

void add_sums(const Job& job, long panel, const Target* targets, int rows, const float* c) {
    for (int r = 0; r < rows; r++) {
        float* y = (float*)job.call.y + targets[r].row * job.call.y_stride + panel * PANEL;
        vec::F weight = vec::set(targets[r].weight);
        vec::for_lanes(std::min<long>(job.linear.n - panel * PANEL, PANEL), [&](long v, int lanes) {
            vec::F sum = vec::fma(weight, vec::load(c + r * PANEL + v), vec::load_some(y + v, lanes));
            vec::store_some(y + v, sum, lanes);
        });
    }
}

void store_sums(const Job& job, long panel, long row, int rows, const float* c) {
    if (job.targets)
        add_sums(job, panel, job.targets + row, rows, c);
    else if (job.call.y_dtype == FLOAT32)
        store_as<float>(job, panel, row, rows, c);
    else
        store_as<bf16>(job, panel, row, rows, c);
}

// The slice [from, to) of one panel times the tiles of a block; `ahead` bytes on lies what is wanted next.
void multiply(const Job& job, const Slice& slice, long panel, long from, long to, long first_tile, float* sums,
              long ahead) {
    long last_tile = std::min(first_tile + job.block, job.tiling.num_tiles);
    long bytes = (to - from) * job.layout.unit_bytes, share = bytes / (last_tile - first_tile) + 1;
    const char* next = job.panel(panel) + job.layout.offset_of(from) + ahead;
    for (long tile = first_tile; tile < last_tile; tile++, next += share) {
        int rows = job.tiling.height(tile);
        float* c = sums + (tile - first_tile) * job.most_rows * PANEL;
        if (from == 0) start_sums(job, panel, rows, c);
        prefetch_lines(next, share);
        const char* activations = job.tiles + tile * job.tile_bytes() + from * rows * job.row_bytes;
        if (job.amx)
            amx::multiply(slice, rows, activations, c);
        else
            find_tile(job.layout, rows)(slice, activations, c);
        if (to == job.layout.units) store_sums(job, panel, job.tiling.start(tile), rows, c);
    }
}

// All of K of some panels times the tiles, slice by slice.
void stream(const Job& job, Strided panels, float* sums) {
    const Tiling& tiling = job.tiling;
    auto sums_of = [&](long i, long tile) { return sums + (tile * job.chunk + i) * job.most_rows * PANEL; };
    for (long tile = 0; tile < tiling.num_tiles; tile++)
        for (long i = 0; i < panels.num; i++) start_sums(job, panels.at(i), tiling.height(tile), sums_of(i, tile));
    for (long from = 0; from < job.layout.units; from += job.slice)
        for (long tile = 0; tile < tiling.num_tiles; tile++) {
            int rows = tiling.height(tile);
            Streams streams{{}, {}, panels.num, tile == 0};
            for (long i = 0; i < panels.num; i++)
                streams.packed[i] = job.panel(panels.at(i)), streams.sums[i] = sums_of(i, tile);
            const long to = std::min(from + job.slice, job.layout.units);
            const char* activations = job.tiles + tile * job.tile_bytes() + from * rows * job.row_bytes;
            if (job.amx)
                amx::stream_pairs(streams, from, to, rows, activations);
            else
                find_stream(job.layout, rows)(job.layout, streams, from, to, activations);
        }
    for (long tile = 0; tile < tiling.num_tiles; tile++)
        for (long i = 0; i < panels.num; i++)
            store_sums(job, panels.at(i), tiling.start(tile), tiling.height(tile), sums_of(i, tile));
}

void multiply_block(const Job& job, long first_tile, Strided panels, char* scratch) {
    float* sums = (float*)scratch;
    long panel_sums = job.block * job.most_rows * PANEL;
    long ahead = job.few ? FEW_AHEAD : panels.stride * job.layout.panel_bytes();
    for (long from = 0; from < job.layout.units; from += job.slice) {
        long to = std::min(from + job.slice, job.layout.units);
        for (long i = 0; i < panels.num; i++) {
            Slice slice = unpack(job, panels.at(i), from, to, scratch + job.sums_bytes());
            multiply(job, slice, panels.at(i), from, to, first_tile, sums + i * panel_sums, ahead);
        }
    }
}

template <class X>
void pack_rows(const Job& job, long tile, const X* x, long part, long parts) {
    const Format& f = job.layout.format;
    const int rows = job.tiling.height(tile), side = job.amx && f.bits == 16 ? AMX_WORDS : 1;
    const long k = job.linear.k, units = job.layout.units, sides = (units + side - 1) / side;
    const long first = part * sides / parts * side, last = std::min((part + 1) * sides / parts * side, units);
    char* out = job.tiles + tile * job.tile_bytes();
    auto groups = [&](auto order) {
        pack_groups<decltype(order)>(job.layout, x, k, job.linear.order, rows, first, last, out);
    };
    if (job.layout.floats)
        pack_floats(x, k, rows, f.coding == FLOATS ? vec::FLOAT8_X : 1, (float*)out, units * job.layout.columns);
    else if (f.bits == 16)
        side > 1 ? pack_words<AMX_WORDS>((const bf16*)x, k, rows, first, last, (uint32_t*)out)
                 : pack_words<1>((const bf16*)x, k, rows, first, last, (uint32_t*)out);
    else if (job.amx)
        groups(ByRows{});
    else if (job.layout.width == 8)
        groups(BySteps<ByteDot<8>::WORDS>{});
    else
        groups(BySteps<1>{});
}
}  // namespace

void pack_tile(const Job& job, long tile, const void* x, long part, long parts) {
    if (job.call.x_dtype == FLOAT32)
        pack_rows(job, tile, (const float*)x, part, parts);
    else
        pack_rows(job, tile, (const bf16*)x, part, parts);
}

long Job::pack_parts() const {
    bool divided = !layout.floats && tiling.num_tiles < call.threads;
    return divided && call.m * linear.k >= PACKED_TOGETHER ? call.threads : 1;
}

void multiply_item(const Job& job, long item, char* scratch) {
    const amx::InUse in_use;
    if (job.stream) return stream(job, job.cut.item(item), (float*)scratch);
    if (job.few) return multiply_block(job, 0, job.cut.item(item), scratch);
    long first = item % job.num_chunks() * job.chunk, num = std::min(job.chunk, job.num_panels - first);
    multiply_block(job, item / job.num_chunks() * job.block, {first, num, 1}, scratch);
}

void multiply_panels(const Job& job, Strided panels, char* scratch) {
    const amx::InUse in_use;
    for (long i = 0; i < panels.num; i += job.chunk) {
        Strided some{panels.at(i), std::min(job.chunk, panels.num - i), panels.stride};
        if (job.stream)
            stream(job, some, (float*)scratch);
        else
            for (long tile = 0; tile < job.tiling.num_tiles; tile += job.block) multiply_block(job, tile, some, scratch);
    }
}

EXPORT int blade_linear(const LinearCall* call) {
    if (call->m == 0) return OK;
    Job job(*call);
    long tiles = aligned(job.packed_bytes());
    Scratch scratch(tiles + call->threads * job.per_thread);
    if (!scratch.data) return OUT_OF_MEMORY;
    job.tiles = (char*)scratch.data;
    job.scratch = job.tiles + tiles;
    long row = job.linear.k * (call->x_dtype == FLOAT32 ? 4 : 2);
    const long parts = job.pack_parts();
    parallel_for(call->threads, job.tiling.num_tiles * parts, 1, [&](long item, int) {
        long tile = item / parts;
        pack_tile(job, tile, (const char*)call->x + job.tiling.start(tile) * row, item % parts, parts);
    });
    auto multiply = [&](long item, int thread) { multiply_item(job, item, job.scratch + thread * job.per_thread); };
    if (job.few)
        parallel_parts(call->threads, job.num_items(), multiply);
    else
        parallel_for(call->threads, job.num_items(), 1, multiply);
    return OK;
}
