// A run of packed units becomes what the tiles of a linear (linear_tile.h) multiply with: bytes, floats.
#pragma once
#include <utility>

#include "linear_format.h"

// Calls body(i) with the compile-time constants i = 0 .. N - 1.
template <int... I, class Body>
INLINE void for_constants(std::integer_sequence<int, I...>, Body body) {
    (body(std::integral_constant<int, I>{}), ...);
}

// bf16 words [units][32] -> floats [units][2][32]: the even elements, the odd ones.
INLINE void widen_bf16(const uint32_t* words, long units, float* out) {
    for (long u = 0; u < units; u++, words += PANEL, out += 2 * PANEL)
        for (int v = 0; v < PANEL; v += vec::LANES) {
            vec::W word = vec::word(words + v);
            vec::store(out + v, vec::as_float(vec::shift<16>(word)));
            vec::store(out + PANEL + v, vec::as_float(vec::high_halves(word)));
        }
}

// The low and high bits of one group -> [steps][32] words of four bytes.
template <int BITS>
INLINE void unpack_bits(const uint32_t* low, int steps, uint32_t* out) {
    constexpr int EXTRA = BITS - 4;                            // high bits of a number
    constexpr int SPAN = EXTRA ? 8 / EXTRA : 2;                // steps that share a word of them
    constexpr int MASK = ((1 << EXTRA) - 1) << 4;
    const uint32_t* high = low + steps / 2 * PANEL;
    for (int s = 0; s < steps; s += SPAN, high += PANEL, low += SPAN / 2 * PANEL, out += SPAN * PANEL)
        for (int v = 0; v < PANEL; v += vec::LANES) {
            vec::W extra = vec::word((EXTRA ? high : low) + v);
            for_constants(std::make_integer_sequence<int, SPAN>{}, [&](auto i) {
                vec::W nibbles = vec::word(low + i / 2 * PANEL + v);
                vec::W q = i % 2 ? vec::high_nibbles(nibbles) : vec::low_nibbles(nibbles);
                if constexpr (EXTRA > 0) q = vec::either(q, vec::keep_bits(vec::shift<4 - i * EXTRA>(extra), MASK));
                vec::store_word(out + i * PANEL + v, q);
            });
        }
}

// Sixteen scales or minima of `numbers`' kind; the block's halves are those that codes count.
INLINE vec::F numbers_at(int numbers, const char* unit, const char* block, int channel) {
    if (numbers == HALF) return vec::half_to_float(unit + 2 * channel);
    vec::F codes = numbers == UNSIGNED_CODES ? vec::load((const uint8_t*)unit + channel)
                                             : vec::load((const int8_t*)unit + channel);
    return vec::mul(codes, vec::half_to_float(block + 2 * channel));
}

// One unit's scales [32] and offsets [32], for w = scale * q + offset; without offsets those are left alone.
INLINE void unpack_scales(const Layout& layout, const char* unit, const char* block, float* scales, float* offsets) {
    const Format& f = layout.format;
    for (int v = 0; v < PANEL; v += vec::LANES) {
        vec::F scale = numbers_at(f.scales, unit, block, v);
        vec::store(scales + v, scale);
        if (f.offsets == ZEROS)
            vec::store(offsets + v, vec::mul(vec::sub(vec::zero(), scale),
                                             vec::load((const uint8_t*)unit + layout.offsets + v)));
        else if (f.offsets != NONE)
            vec::store(offsets + v, numbers_at(f.offsets, unit + layout.offsets, block + block_bytes_of(f.scales), v));
    }
}

// Calls body(constant of bits) for a grouped format.
template <class Body>
INLINE void with_bits(int bits, Body body) {
    switch (bits) {
        case 8: return body(std::integral_constant<int, 8>{});
        case 6: return body(std::integral_constant<int, 6>{});
        case 5: return body(std::integral_constant<int, 5>{});
        default: return body(std::integral_constant<int, 4>{});
    }
}
