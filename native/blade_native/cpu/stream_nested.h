// The inner loops of linears over few rows of nested numbers (linear_format.h), on their way from memory. What a unit adds up
// to is an exact integer, however it is summed.
#pragma once
#include "stream_tile.h"
#include "unpack.h"

#ifdef __AVX512VNNI__
constexpr long NESTED_AHEAD = 3072;  // bytes between what is read and what is prefetched

// A unit's sums [R] of sixteen channels: integers as floats. Numbers become bytes before they are multiplied.
template <int NIBBLES, int R>
INLINE void sum_bytes(const Layout layout, const char* unit, int channel,
                      const ActivationGroup& activations, long ahead, vec::F (&out)[R]) {
    typedef ByteDot<8> Dot;
    const uint32_t *low = (const uint32_t*)(unit + layout.quants) + channel, *x = activations.words;
    const int words = NIBBLES ? NIBBLES : layout.format.group / 8;
    vec::I sums[R];
    UNROLL for (int r = 0; r < R; r++) sums[r] = vec::splat(activations.starts + r);
    for (int g = 0; g < layout.groups; g++) {
        Nested nested(layout, unit, g, channel);
        for (int i = 0; i < words; i++, low += PANEL, x += 2 * R) {
            prefetch_lines((const char*)low + ahead, 64);
            vec::W nibbles = vec::word(low);
            vec::W even = nested.bytes(vec::low_nibbles(nibbles)), odd = nested.bytes(vec::high_nibbles(nibbles));
            UNROLL for (int r = 0; r < R; r++) sums[r] = Dot::dot(sums[r], even, x + r);
            UNROLL for (int r = 0; r < R; r++) sums[r] = Dot::dot(sums[r], odd, x + R + r);
        }
    }
    UNROLL for (int r = 0; r < R; r++) out[r] = vec::to_float(sums[r]);
}

// The same for 16 NV channels, scaling sums of nibbles: whole numbers of less than 24 bits, which floats hold exactly.
template <int NIBBLES, int R, int NV>
INLINE void sum_nibbles(const Layout layout, const char* unit, int channel,
                        const ActivationGroup& activations, long ahead, vec::F (&out)[NV][R]) {
    typedef ByteDot<8> Dot;
    const uint32_t *low = (const uint32_t*)(unit + layout.quants) + channel, *x = activations.words;
    const int words = NIBBLES ? NIBBLES : layout.format.group / 8;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < NV; v++) out[v][r] = vec::to_float(vec::splat(activations.starts + r));
    for (int g = 0; g < layout.groups; g++) {
        vec::I sums[NV][R];
        UNROLL for (int v = 0; v < NV; v++)
            UNROLL for (int r = 0; r < R; r++) sums[v][r] = vec::set_int(0);
        for (int i = 0; i < words; i++, low += PANEL, x += 2 * R)
            UNROLL for (int v = 0; v < NV; v++) {
                prefetch_lines((const char*)(low + v * vec::LANES) + ahead, 64);
                vec::W nibbles = vec::word(low + v * vec::LANES);
                vec::W even = vec::low_nibbles(nibbles), odd = vec::high_nibbles(nibbles);
                UNROLL for (int r = 0; r < R; r++) sums[v][r] = Dot::dot(sums[v][r], even, x + r);
                UNROLL for (int r = 0; r < R; r++) sums[v][r] = Dot::dot(sums[v][r], odd, x + R + r);
            }
        UNROLL for (int v = 0; v < NV; v++) {
            const char* numbers = unit + channel + v * vec::LANES;
            vec::F scale = vec::add(vec::load_nibbles(numbers + (2 + g / 2) * PANEL, g % 2), vec::set(1));
            vec::F start = vec::load((const uint8_t*)numbers + layout.offsets + g * PANEL);
            UNROLL for (int r = 0; r < R; r++) {
                out[v][r] = vec::fma(vec::to_float(sums[v][r]), scale, out[v][r]);
                out[v][r] = vec::fma(start, vec::set(activations.factors[g * R + r]), out[v][r]);
            }
        }
    }
}

template <int R, int NIBBLES>
INLINE void nested_units(const Layout& layout, const Streams& s, long from, long to, const char* activations) {
    constexpr int WORDS = ByteDot<8>::WORDS;
    const Layout l = layout;  // no store can change it: it stays in registers
    const long ahead = s.fetch ? NESTED_AHEAD : 0, bytes = R * activation_bytes(l.steps, WORDS, l.groups);
    for (long unit = l.offset_of(from); from < to; from++, unit += l.unit_bytes, activations += bytes) {
        const ActivationGroup group(activations, R, l.groups);
        for (long i = 0; i < s.num; i++) prefetch_lines(s.packed[i] + unit + ahead, l.quants);
        for (long i = 0; i < s.num; i++) {
            const char* at = s.packed[i] + unit;
            constexpr int NV = R <= LATE_ROWS ? 2 : 1;
            for (int channel = 0; channel < PANEL; channel += NV * vec::LANES) {
                vec::F sums[NV][R];
                if constexpr (R <= LATE_ROWS)
                    sum_nibbles<NIBBLES, R, NV>(l, at, channel, group, ahead, sums);
                else
                    sum_bytes<NIBBLES, R>(l, at, channel, group, ahead, sums[0]);
                UNROLL for (int v = 0; v < NV; v++) {
                    vec::F scale = vec::half_to_float(at + 2 * (channel + v * vec::LANES));
                    UNROLL for (int r = 0; r < R; r++) {
                        float* to = s.sums[i] + r * PANEL + channel + v * vec::LANES;
                        vec::store(to, vec::fma(sums[v][r], vec::mul(scale, vec::set(group.scales[r])), vec::load(to)));
                    }
                }
            }
            vec::forget_memory();
        }
    }
}

template <int R>
void stream_nested(const Layout& layout, const Streams& streams, long from, long to, const char* activations) {
    if (layout.format.group == 32)
        nested_units<R, 4>(layout, streams, from, to, activations);
    else
        nested_units<R, 0>(layout, streams, from, to, activations);
}
#else
template <int R>
constexpr StreamTile stream_nested = nullptr;  // no layout is
#endif
