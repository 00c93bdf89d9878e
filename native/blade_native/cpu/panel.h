// Putting one channel's quantised numbers into its lane of a panel (linear_format.h), as all that packs does.
#pragma once
#include "unpack.h"

// One channel's q of a group, at its lane of the unit's bits: two steps, eight numbers, at a time.
template <int BITS>
INLINE void put_bits(const uint8_t* q, int steps, int lane, uint32_t* low) {
    constexpr int EXTRA = high_bits(BITS), SPAN = SPAN_STEPS<BITS>;
    constexpr uint64_t BYTES = 0x0101010101010101;  // 1 in each byte
    uint32_t *high = low + steps / 2 * PANEL + lane, extra = 0;
    low += lane;
    for (int s = 0; s < steps; s += 2) {
        uint64_t numbers;
        memcpy(&numbers, q + 4 * s, 8);
        if constexpr (BITS == 8) {
            low[s * PANEL] = uint32_t(numbers), low[(s + 1) * PANEL] = uint32_t(numbers >> 32);
            continue;
        }
        uint64_t nibbles = numbers & 15 * BYTES, above = numbers >> 4 & ((1 << EXTRA) - 1) * BYTES;
        low[s / 2 * PANEL] = uint32_t(nibbles | nibbles >> 28);  // the second step's beside the first's
        extra |= uint32_t(above | above >> (32 - EXTRA)) << s % SPAN * EXTRA;
        if (EXTRA && s % SPAN == SPAN - 2) high[s / SPAN * PANEL] = extra, extra = 0;
    }
}

// Entry i of one channel's scales or offsets.
INLINE void put_number(int numbers, const void* values, long i, int lane, char* out) {
    switch (bytes_of(numbers) / PANEL) {
        case 1: out[lane] = ((const char*)values)[i]; break;
        case 2: memcpy(out + 2 * lane, (const uint16_t*)values + i, 2); break;
        case 4: memcpy(out + 4 * lane, (const uint32_t*)values + i, 4); break;
    }
}

// A block's halves, which codes count; those that the format lacks are not read.
INLINE void put_header(const Format& f, const uint16_t* scale, const uint16_t* offset, int lane, char* header) {
    if (block_bytes_of(f.scales)) put_number(HALF, scale, 0, lane, header);
    if (block_bytes_of(f.offsets)) put_number(HALF, offset, 0, lane, header + block_bytes_of(f.scales));
}
