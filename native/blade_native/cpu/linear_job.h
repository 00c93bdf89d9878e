// A linear cut into items of work, for who runs one alone (linear.cpp) and who runs many side by side (experts.cpp).
#pragma once
#include <algorithm>

#include "linear_format.h"
#include "parallel.h"
#include "tile_shape.h"

// Rows [0, m) cut into tiles as even as they get of whole steps of rows, but for the end.
struct Tiling {
    long m, num_tiles, step;
    long start(long tile) const { return std::min(m, tile * ((m + step - 1) / step) / num_tiles * step); }
    int height(long tile) const { return int(start(tile + 1) - start(tile)); }
};

// Where a row of a product goes that is added to others: y[row] += weight * it.
struct Target {
    int32_t row;
    float weight;
};

// How one linear is computed. It starts with `tiles` and `scratch` unset: `packed_bytes` for the packed
// activations, and `per_thread` bytes of scratch for each thread.
struct Job {
    LinearCall call;
    const Linear& linear;
    Layout layout;
    int most_rows;  // of a tile
    Tiling tiling;
    long num_panels;
    bool few, stream;               // tiles: the weights are read once; and straight from memory into registers
    bool amx;                       // the tiles are amx_tile.h's
    long unpacked, row_bytes;       // bytes of a unit, unpacked for a panel and of one row's activations
    long slice, block, chunk;       // units of K per slice, tiles per block, panels handed to a thread at once, at most
    Cut cut;                        // of the panels into items, where tiles are few
    long per_thread;                // bytes of scratch
    char *tiles = nullptr, *scratch = nullptr;
    const Target* targets = nullptr;  // [m], or null: rows are stored in order. With them y is float32

    explicit Job(const LinearCall& c);
    long pack_parts() const;  // of a tile's activations, for as many threads
    long sums_bytes() const { return chunk * block * most_rows * PANEL * 4; }
    long tile_bytes() const { return most_rows * layout.units * row_bytes; }
    const char* panel(long i) const { return linear.weights + i * layout.panel_bytes(); }
    long num_blocks() const { return (tiling.num_tiles + block - 1) / block; }
    long num_chunks() const { return (num_panels + chunk - 1) / chunk; }
    long num_items() const { return few ? cut.num_items() : num_blocks() * num_chunks(); }
    long packed_bytes() const {  // of all tiles, whose last one need not be whole
        return (tiling.num_tiles - 1) * tile_bytes() + tiling.height(tiling.num_tiles - 1) * layout.units * row_bytes;
    }
};

// Packs the rows of one tile, which lie side by side at x, in x_dtype; or part i of `parts` parts of them.
void pack_tile(const Job& job, long tile, const void* x, long part = 0, long parts = 1);

// The product of item i: some panels times a block of tiles, or times all of few tiles.
void multiply_item(const Job& job, long item, char* scratch);

// The product of panels and all tiles.
void multiply_panels(const Job& job, Strided panels, char* scratch);

INLINE long aligned(long bytes) { return (bytes + 63) / 64 * 64; }
