// Putting one channel's quantised numbers into its lane of a panel (linear_format.h), as all that packs does.
#pragma once
#include "unpack.h"

// One channel's q of a group, at its lane of the unit's bits.
template <int BITS>
INLINE void put_bits(const uint8_t* q, int steps, int lane, uint32_t* low) {
    constexpr int EXTRA = high_bits(BITS), SPAN = SPAN_STEPS<BITS>;
    uint32_t *high = low + steps / 2 * PANEL, extra = 0, nibbles = 0;
    for (int s = 0; s < steps; s++) {
        uint32_t word;
        memcpy(&word, q + 4 * s, 4);
        if constexpr (BITS == 8) {
            low[s * PANEL + lane] = word;
            continue;
        }
        nibbles |= (word & 0x0f0f0f0f) << s % 2 * 4;
        extra |= (word >> 4 & 0x0f0f0f0f) << s % SPAN * EXTRA;
        if (s % 2) low[s / 2 * PANEL + lane] = nibbles, nibbles = 0;
        if (EXTRA && s % SPAN == SPAN - 1) high[s / SPAN * PANEL + lane] = extra, extra = 0;
    }
}

// Entry i of one channel's scales or offsets.
INLINE void put_number(int numbers, const void* values, long i, int lane, char* out) {
    if (numbers == HALF)
        memcpy(out + 2 * lane, (const uint16_t*)values + i, 2);
    else if (numbers != NONE)
        out[lane] = ((const char*)values)[i];
}

// A block's halves, which codes count; those that the format lacks are not read.
INLINE void put_header(const Format& f, const uint16_t* scale, const uint16_t* offset, int lane, char* header) {
    if (block_bytes_of(f.scales)) put_number(HALF, scale, 0, lane, header);
    if (block_bytes_of(f.offsets)) put_number(HALF, offset, 0, lane, header + block_bytes_of(f.scales));
}
