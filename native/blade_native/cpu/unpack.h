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

// One unit of 8-bit floats -> floats [columns][32], which its scales have still to be multiplied by.
INLINE void widen_float8(const Layout& layout, const char* unit, float* out) {
    for (int v = 0; v < PANEL; v += vec::LANES) {
        const uint16_t* pairs = (const uint16_t*)(unit + layout.quants) + v;
        vec::F first, second;
        for (long u = 0; u < layout.columns; u += 2, pairs += PANEL) {
            vec::widen_float8(pairs, first, second);
            vec::store(out + u * PANEL + v, first);
            vec::store(out + (u + 1) * PANEL + v, second);
        }
    }
}

constexpr int high_bits(int bits) { return bits < 8 ? bits - 4 : 0; }  // beyond the nibble
template <int BITS>
constexpr int SPAN_STEPS = BITS == 8 ? 1 : high_bits(BITS) ? 8 / high_bits(BITS) : 2;  // that share words of bits

// Step I of a span, sixteen words of four bytes; `low` and `high` are where the span's bits start.
template <int BITS, int I>
INLINE vec::W step_of(const uint32_t* low, const uint32_t* high) {
    constexpr int EXTRA = high_bits(BITS), MASK = ((1 << EXTRA) - 1) << 4;
    if constexpr (BITS == 8) return vec::word(low);
    vec::W nibbles = vec::word(low + I / 2 * PANEL);
    vec::W q = I % 2 ? vec::high_nibbles(nibbles) : vec::low_nibbles(nibbles);
    if constexpr (EXTRA > 0)
        q = vec::either(q, vec::keep_bits(vec::shift<4 - I * EXTRA>(vec::word(high)), MASK));
    return q;
}

// How BITS of a weight become the integer of WIDTH bits that is multiplied.
template <int B, int W = B>
struct Packing {
    static constexpr int BITS = B, WIDTH = W;
};

template <class P>
struct Steps {
    vec::Table values;
    explicit Steps(const Format& f) : values(vec::table(f.values)) {}

    template <int I>
    inline __attribute__((always_inline)) vec::W step(const uint32_t* low, const uint32_t* high) const {
        vec::W q = step_of<P::BITS, I>(low, high);
        if constexpr (P::WIDTH != P::BITS) return vec::look_up(values, q);
        return q;
    }
};

// The low and high bits of one group -> [steps][32] words of four bytes.
template <class P>
INLINE void unpack_bits(const Format& f, const uint32_t* low, int steps, uint32_t* out) {
    constexpr int SPAN = SPAN_STEPS<P::BITS>;
    const Steps<P> unpacked(f);
    const uint32_t* high = low + steps / 2 * PANEL;
    for (int s = 0; s < steps; s += SPAN, high += PANEL, low += SPAN / 2 * PANEL, out += SPAN * PANEL)
        for (int v = 0; v < PANEL; v += vec::LANES)
            for_constants(std::make_integer_sequence<int, SPAN>{}, [&](auto i) {
                vec::store_word(out + i * PANEL + v, unpacked.template step<i>(low + v, high + v));
            });
}

// What a block's codes count, in floats: those of scales, then those of offsets; unset for what has no codes.
struct BlockUnits {
    float scales[PANEL], offsets[PANEL];

    INLINE void widen(const void* halves, float* out) {
        for (int v = 0; v < PANEL; v += vec::LANES) vec::store(out + v, vec::half_to_float((const char*)halves + 2 * v));
    }
    inline void set(const Format& f, const char* header) {
        if (block_bytes_of(f.scales)) widen(header, scales);
        if (block_bytes_of(f.offsets)) widen(header + block_bytes_of(f.scales), offsets);
    }
};

// Sixteen scales or minima of `numbers`' kind; `counted` is what codes count.
INLINE vec::F numbers_at(int numbers, const char* unit, const float* counted, int channel) {
    if (numbers == HALF) return vec::half_to_float(unit + 2 * channel);
    if (numbers >= BRAIN)
        return numbers == BRAIN ? vec::load((const bf16*)unit + channel) : vec::load((const float*)unit + channel);
    vec::F codes = numbers == UNSIGNED_CODES ? vec::load((const uint8_t*)unit + channel)
                                             : vec::load((const int8_t*)unit + channel);
    return vec::mul(codes, vec::load(counted + channel));
}

// Sixteen offsets of a format that has them, given the scales.
INLINE vec::F offset_at(const Format& f, const char* offsets, const BlockUnits& block, int channel, vec::F scale) {
    if (f.offsets == ZEROS) return vec::mul(vec::sub(vec::zero(), scale), vec::load((const uint8_t*)offsets + channel));
    return numbers_at(f.offsets, offsets, block.offsets, channel);
}

// One unit's scales [32] and offsets [32], for w = scale * q + offset; without offsets those are left alone.
INLINE void unpack_scales(const Layout& layout, const char* unit, const BlockUnits& block, float* scales,
                          float* offsets) {
    const Format& f = layout.format;
    for (int v = 0; v < PANEL; v += vec::LANES) {
        if (f.coding == NESTED) {
            vec::store(scales + v, vec::half_to_float(unit + 2 * v));
            continue;
        }
        vec::F scale = numbers_at(f.scales, unit, block.scales, v);
        vec::store(scales + v, scale);
        if (f.offsets != NONE) vec::store(offsets + v, offset_at(f, unit + layout.offsets, block, v, scale));
    }
}

// Calls body(constant of bits) for integers of 4, 5, 6 or 8.
template <class Body>
INLINE void with_bits(int bits, Body body) {
    switch (bits) {
        case 8: return body(std::integral_constant<int, 8>{});
        case 6: return body(std::integral_constant<int, 6>{});
        case 5: return body(std::integral_constant<int, 5>{});
        default: return body(std::integral_constant<int, 4>{});
    }
}

// Calls body(Packing) for a grouped format.
template <class Body>
INLINE void with_packing(const Layout& layout, Body body) {
    if (layout.format.coding == VALUES) return layout.width == 5 ? body(Packing<4, 5>{}) : body(Packing<4, 8>{});
    with_bits(layout.format.bits, [&](auto bits) { body(Packing<bits>{}); });
}

#ifdef __AVX512VNNI__
// Sixteen channels' part in a group of nested numbers: how their nibbles become bytes.
struct Nested {
    vec::W scales, starts;  // in both halves of a word, and in all its bytes
    Nested(const Layout& layout, const char* unit, int group, int channel)
        : starts(vec::spread_bytes(unit + layout.offsets + group * PANEL + channel)) {
        vec::W codes = vec::spread_shorts(unit + (2 + group / 2) * PANEL + channel);
        codes = group % 2 ? vec::high_nibbles(codes) : vec::low_nibbles(codes);
        scales = vec::add_bytes(codes, vec::one_shorts());
    }
    // No product of a scale and a nibble is more than a byte: the two of a half do not touch.
    inline __attribute__((always_inline)) vec::W bytes(vec::W nibbles) const {
        return vec::add_bytes(vec::mul_shorts(nibbles, scales), starts);
    }
};

// One unit's nested numbers -> [steps][32] words of bytes.
INLINE void unpack_nested(const Layout& layout, const char* unit, uint32_t* out) {
    const uint32_t* low = (const uint32_t*)(unit + layout.quants);
    const int steps = layout.format.group / 4;
    for (int g = 0; g < layout.groups; g++, low += steps / 2 * PANEL, out += steps * PANEL)
        for (int v = 0; v < PANEL; v += vec::LANES) {
            Nested nested(layout, unit, g, v);
            for (int s = 0; s < steps; s += 2) {
                vec::W nibbles = vec::word(low + s / 2 * PANEL + v);
                vec::store_word(out + s * PANEL + v, nested.bytes(vec::low_nibbles(nibbles)));
                vec::store_word(out + (s + 1) * PANEL + v, nested.bytes(vec::high_nibbles(nibbles)));
            }
        }
}
#else
INLINE void unpack_nested(const Layout&, const char*, uint32_t*) {}  // no layout is
#endif

// One unit's integers, [steps][32] words of bytes: where they are, or in `room`.
INLINE const uint32_t* unpack_unit(const Layout& layout, const char* unit, uint32_t* room) {
    const uint32_t* quants = (const uint32_t*)(unit + layout.quants);
    if (layout.format.bits == 8) return quants;
    if (layout.format.coding == NESTED) return unpack_nested(layout, unit, room), room;
    with_packing(layout, [&](auto p) {
        if constexpr (p.BITS < 8) unpack_bits<decltype(p)>(layout.format, quants, layout.steps, room);
    });
    return room;
}
