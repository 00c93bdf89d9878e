// How packed weights lie in memory. A panel is 32 output channels; along K it is a run of units:
//   dense    unit = one 32-bit word of K (a float, two bf16):  {[32] words}
//   grouped  unit = a group:  {[32] scales, [32] offsets, low bits, high bits}
//            low bits   8-bit weights: [steps][32] words, a step being four numbers of K
//                       else: [steps / 2][32] words of nibbles, the low ones of a word are one step, the high the next
//            high bits  5-bit weights: [steps / 8][32] words, bit i of a byte belongs to step i of eight
//                       6-bit weights: [steps / 4][32] words, two bits for each of four steps
//            floats     [group / 2][2][16] pairs of bytes, a channel's at float8_place, scales times FLOAT8_SCALE (vec.h);
//                       zeros beyond K
//   nested   unit = groups that share a unit of their numbers, and whose integers are multiplied together as bytes:
//            {[32] halves, groups / 2 x [32] bytes of two nibbles, scale codes - 1, the first group's in the low one,
//             groups x [32] bytes of 128 - minimum code, low bits}
//            Where scales or offsets are codes, each block of units is preceded by {[32] halves, [32] halves} of those.
#pragma once
#include <algorithm>

#include "api.h"
#include "tile_shape.h"
#include "vec.h"

constexpr int PANEL = 32;      // output channels
constexpr int MAX_GROUP = 128;  // numbers of a row

// Bytes that 32 channels' scales or offsets take in a unit, and in a block.
INLINE long bytes_of(int numbers) {
    switch (numbers) {
        case NONE: return 0;
        case HALF:
        case BRAIN: return 2 * PANEL;
        case SINGLE: return 4 * PANEL;
        default: return PANEL;
    }
}
INLINE long block_bytes_of(int numbers) {
    return numbers == UNSIGNED_CODES || numbers == SIGNED_CODES ? 2 * PANEL : 0;
}

struct Layout {
    Format format;
    long units;            // of a panel
    long columns;          // of a unit: numbers of K
    bool floats;           // weights and activations become floats to be multiplied
    int steps;             // of a unit, four columns each; 1 for dense weights
    int groups;            // of a unit
    int width;             // bits of the integers that are multiplied
    int zero;              // what these are centred on; 0 with offsets
    long offsets, quants;  // where they start in a unit
    long unit_bytes, block_header;
    long block;  // units; all of a panel where there are no codes

    Layout(const Format& f, long k) : format(f) {
        bool dense = f.bits >= 16, nested = f.coding == NESTED && NESTS;
        if (!nested && f.coding == NESTED) format.coding = INTEGERS;
        columns = dense ? 32 / f.bits : f.group;
        if (nested) columns = f.block;
        units = (k + columns - 1) / columns;
        floats = f.bits == 32 || (f.bits == 16 && WIDENS_BF16) || f.coding == FLOATS;
        steps = dense ? 1 : columns / 4;
        groups = dense ? 1 : columns / f.group;
        bool wide = f.coding == VALUES && *std::max_element(f.values, f.values + 16) >= 32;
        width = nested ? 8 : f.coding != VALUES ? f.bits : wide ? 8 : 5;
        bool centred = nested || (!dense && f.coding == INTEGERS && f.offsets == NONE);
        zero = centred ? 1 << (width - 1) : f.coding == VALUES ? f.zero : 0;
        offsets = dense ? 0 : nested ? 2 * PANEL + (groups + 1) / 2 * PANEL : bytes_of(f.scales);
        quants = dense ? 0 : offsets + groups * bytes_of(f.offsets);
        unit_bytes = dense ? 4 * PANEL : quants + columns * f.bits / 8 * PANEL;
        block_header = dense || nested ? 0 : block_bytes_of(f.scales) + block_bytes_of(f.offsets);
        block = block_header ? f.block / columns : units;
    }
    long panel_bytes() const { return offset_of(units - 1) + unit_bytes; }
    // From the start of a panel to its block's header, and to its unit.
    long header_of(long unit) const { return unit / block * (block_header + block * unit_bytes); }
    long offset_of(long unit) const { return (unit / block + 1) * block_header + unit * unit_bytes; }
};
