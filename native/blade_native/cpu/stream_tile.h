// The inner loops of linears over few rows, as in decoding: weights are unpacked in registers on their way from memory,
// for each is used only once, or once for each of a few tiles. The arithmetic, and its order, are those of linear_tile.h.
#pragma once
#include <algorithm>

#include "linear_tile.h"
#include "unpack.h"

constexpr int STREAM_ROWS = 4;       // taller tiles are worth unpacking a slice for
constexpr long STREAM_AHEAD = 2048;  // bytes between what is read and what is prefetched

// Units [from, to) of a panel's packed weights times R rows of their activations, onto floats c [R][32]. `fetch`: what
// lies STREAM_AHEAD is to be prefetched.
typedef void (*StreamTile)(const Layout& layout, const char* packed, long from, long to, const char* activations,
                           float* c, bool fetch);

INLINE void prefetch_lines(const char* at, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// bf16 words [units][32], activations floats [2 units][R]. Only where no instruction multiplies bf16.
template <int R>
void stream_bf16(const Layout&, const char* packed, long from, long to, const char* activations, float* c,
                 bool fetch) {
    constexpr int NV = TILE_VECTORS<R>;
    for (int first = 0; first < PANEL; first += NV * vec::LANES) {
        const uint32_t *words = (const uint32_t*)packed + from * PANEL + first, *end = words + (to - from) * PANEL;
        const float* a = (const float*)activations;
        // Half by half, each half fetches its own lines of the next slice.
        const long ahead = !fetch ? 0 : NV * vec::LANES == PANEL ? STREAM_AHEAD : (to - from) * 4 * PANEL;
        vec::F sums[R][NV];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) sums[r][v] = vec::load(c + r * PANEL + first + v * vec::LANES);
        for (; words < end; words += PANEL, a += 2 * R)
            for (int v = 0; v < NV; v++) {
                prefetch_lines((const char*)(words + v * vec::LANES) + ahead, 64);
                vec::W word = vec::word(words + v * vec::LANES);
                vec::F even = vec::as_float(vec::shift<16>(word)), odd = vec::as_float(vec::high_halves(word));
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) sums[r][v] = vec::fma(even, vec::set(a[r]), sums[r][v]);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) sums[r][v] = vec::fma(odd, vec::set(a[R + r]), sums[r][v]);
            }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) vec::store(c + r * PANEL + first + v * vec::LANES, sums[r][v]);
    }
}

// Units of 8-bit floats, activations floats [units][columns][R]. What widen_float8 makes is what is multiplied here too.
template <int R>
void stream_float8(const Layout& layout, const char* packed, long from, long to, const char* activations, float* c,
                   bool fetch) {
    constexpr int NV = TILE_VECTORS<R>;
    const long ahead = fetch ? STREAM_AHEAD : 0;
    for (int first = 0; first < PANEL; first += NV * vec::LANES) {
        const float* a = (const float*)activations;
        vec::F sums[R][NV], scales[NV];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) sums[r][v] = vec::load(c + r * PANEL + first + v * vec::LANES);
        for (long u = from; u < to; u++) {
            const char* unit = packed + layout.offset_of(u);
            for (int v = 0; v < NV; v++) scales[v] = vec::load((const float*)unit + first + v * vec::LANES);
            const uint16_t *pairs = (const uint16_t*)(unit + layout.quants) + first,
                           *end = pairs + layout.columns / 2 * PANEL;
            for (; pairs < end; pairs += PANEL, a += 2 * R) {
                __builtin_prefetch((const char*)pairs + ahead, 0, 2);
                for (int v = 0; v < NV; v++) {
                    vec::F even, odd;
                    vec::widen_float8(pairs + v * vec::LANES, even, odd);
                    even = vec::mul(even, scales[v]), odd = vec::mul(odd, scales[v]);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) sums[r][v] = vec::fma(even, vec::set(a[r]), sums[r][v]);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) sums[r][v] = vec::fma(odd, vec::set(a[R + r]), sums[r][v]);
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) vec::store(c + r * PANEL + first + v * vec::LANES, sums[r][v]);
    }
}

// sums[r][v] += q of 16 NV channels of one group . q of the activations x; `low` and `high` are the channels' bits.
template <class P, int R, int NV>
INLINE void stream_dot(const Steps<P>& unpacked, const uint32_t* low, const uint32_t* high, const uint32_t* x, int steps,
                       vec::I (&sums)[R][NV]) {
    typedef ByteDot<P::WIDTH> Dot;
    constexpr int BITS = P::BITS;
    constexpr int SPAN = SPAN_STEPS<BITS>, CHUNK = std::max({SPAN, Dot::FIT, 4});
    constexpr long LOW_WORDS = BITS == 8 ? SPAN * PANEL : SPAN / 2 * PANEL;
    for (int s = 0; s < steps; s += CHUNK, x += CHUNK * R * Dot::WORDS) {
        typename Dot::Partial partial[R][NV];
        for_constants(std::make_integer_sequence<int, CHUNK>{}, [&](auto i) {
            for (int v = 0; v < NV; v++) {
                auto weights = Dot::weights(
                    unpacked.template step<i % SPAN>(low + v * vec::LANES, high + v * vec::LANES));
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    const uint32_t* activation = x + (i * R + r) * Dot::WORDS;
                    if constexpr (Dot::FIT == 0)
                        sums[r][v] = Dot::dot(sums[r][v], weights, activation);
                    else if constexpr (i % Dot::FIT == 0)
                        partial[r][v] = Dot::first(weights, activation);
                    else
                        partial[r][v] = Dot::dot(partial[r][v], weights, activation);
                    if constexpr (Dot::FIT > 0 && i % Dot::FIT == Dot::FIT - 1)
                        sums[r][v] = Dot::flush(sums[r][v], partial[r][v]);
                }
            }
            if constexpr (i % SPAN == SPAN - 1) low += LOW_WORDS, high += PANEL;
        });
    }
}

template <class P, int R>
void stream_groups(const Layout& layout, const char* packed, long from, long to, const char* activations, float* c,
                   bool fetch) {
    constexpr int WORDS = ByteDot<P::WIDTH>::WORDS, NV = TILE_VECTORS<R>;
    const Format& f = layout.format;
    const Steps<P> unpacked(f);
    const char *header = packed + layout.header_of(from), *unit = packed + layout.offset_of(from);
    const long group_bytes = R * activation_bytes(layout.steps, WORDS);
    long left = layout.block - from % layout.block;  // units of the block
    for (long u = from; u < to; u++, left--, unit += layout.unit_bytes, activations += group_bytes) {
        if (left == 0) left = layout.block, header = unit, unit += layout.block_header;
        if (fetch) prefetch_lines(unit + STREAM_AHEAD, layout.unit_bytes);
        ActivationGroup<R, WORDS> group(activations);
        for (int first = 0; first < PANEL; first += NV * vec::LANES) {
            vec::I sums[R][NV];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
                for (int v = 0; v < NV; v++) sums[r][v] = vec::splat(group.starts + r);
            const uint32_t* low = (const uint32_t*)(unit + layout.quants) + first;
            stream_dot(unpacked, low, low + layout.steps / 2 * PANEL, group.words, layout.steps, sums);
            for (int v = 0; v < NV; v++) {
                int channel = first + v * vec::LANES;
                vec::F scale = numbers_at(f.scales, unit, header, channel);
                vec::F offset = f.offsets == NONE ? vec::zero() : offset_at(layout, unit, header, channel, scale);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    float* to = c + r * PANEL + channel;
                    vec::F factor = vec::mul(scale, vec::set(group.scales[r]));
                    vec::F sum = vec::fma(vec::to_float(sums[r][v]), factor, vec::load(to));
                    if (f.offsets != NONE) sum = vec::fma(offset, vec::set(group.factors[r]), sum);
                    vec::store(to, sum);
                }
            }
        }
    }
}
