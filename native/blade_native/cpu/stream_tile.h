// The inner loops of linears over few rows, as in decoding: weights are unpacked in registers on their way from memory,
// for each is used only once, or once for each of a few tiles. They come from several places at once, a little from one
// after the other: of a single stream a core does not keep enough lines on their way to use the memory's bandwidth. The
// arithmetic, and its order, are those of linear_tile.h.
#pragma once
#include <algorithm>

#include "linear_tile.h"
#include "unpack.h"

constexpr long STREAM_RUN = 1024;    // bytes of a panel before the next one has its turn, or a unit; once a tile has fetched
                                     // them, the others need not take turns, and load and store their sums less often
constexpr long STREAM_PANELS = 3;    // side by side, at most

// Panels that are read side by side, and what their products are added to.
struct Streams {
    const char* packed[STREAM_PANELS];
    float* sums[STREAM_PANELS];  // [R][32] each
    long num;
    bool fetch;  // what lies STREAM_AHEAD is to be prefetched
};

// Units [from, to) of the panels' packed weights times R rows of their activations.
typedef void (*StreamTile)(const Layout& layout, const Streams& streams, long from, long to, const char* activations);

INLINE void prefetch_lines(const char* at, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

template <int R, int NV>
INLINE void load_sums(const float* c, vec::F (&sums)[R][NV]) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::load(c + r * PANEL + v * vec::LANES);
}
template <int R, int NV>
INLINE void keep_sums(float* c, const vec::F (&sums)[R][NV]) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < NV; v++) vec::store(c + r * PANEL + v * vec::LANES, sums[r][v]);
}

// sums[r][v] += two columns of 16 NV channels . those of the activations.
template <int R, int NV>
INLINE void add_bf16(const vec::W (&weights)[NV], const float* x, vec::F (&sums)[R][NV]) {
    if constexpr (WIDENS_BF16) {
        vec::F even[NV], odd[NV];
        UNROLL for (int v = 0; v < NV; v++)
            even[v] = vec::as_float(vec::shift<16>(weights[v])), odd[v] = vec::as_float(vec::high_halves(weights[v]));
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::fma(even[v], vec::set(x[r]), sums[r][v]);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::fma(odd[v], vec::set(x[R + r]), sums[r][v]);
    } else {
        UNROLL for (int r = 0; r < R; r++) {
            vec::W activation = vec::splat(x + r);
            UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::dot_bf16(sums[r][v], weights[v], activation);
        }
    }
}

// bf16 words [units][32]. Activations: words [units][R] where an instruction multiplies them, else floats [2 units][R].
template <int R>
void stream_bf16(const Layout&, const Streams& streams, long from, long to, const char* activations) {
    constexpr int NV = STREAM_VECTORS<R, 16>, PER_UNIT = WIDENS_BF16 ? 2 * R : R;
    const long ahead = streams.fetch ? STREAM_AHEAD : 0, run = streams.fetch ? STREAM_RUN / (4 * PANEL) : to - from;
    for (const float* a = (const float*)activations; from < to; from += run, a += PER_UNIT * run)
        for (long i = 0; i < streams.num; i++)
            for (int first = 0; first < PANEL; first += NV * vec::LANES) {
                const uint32_t* words = (const uint32_t*)streams.packed[i] + from * PANEL + first;
                const uint32_t* end = words + std::min(run, to - from) * PANEL;
                const float* x = a;
                vec::F sums[R][NV];
                load_sums(streams.sums[i] + first, sums);
                for (; words < end; words += PANEL, x += PER_UNIT) {
                    vec::W weights[NV];
                    UNROLL for (int v = 0; v < NV; v++) {
                        prefetch_lines((const char*)(words + v * vec::LANES) + ahead, 64);
                        weights[v] = vec::word(words + v * vec::LANES);
                    }
                    add_bf16(weights, x, sums);
                }
                keep_sums(streams.sums[i] + first, sums);
            }
}

// Pairs of columns of 8-bit floats, all channels of one panel, onto c [R][32].
template <int R>
INLINE void stream_pairs(const uint16_t* pairs, long num, const float* a, long ahead, float* c) {
    constexpr int NV = STREAM_VECTORS<R, 8>;
    for (int first = 0; first < PANEL; first += NV * vec::LANES) {
        const uint16_t *at = pairs + first, *end = at + num * PANEL;
        const float* x = a;
        vec::F sums[R][NV];
        load_sums(c + first, sums);
        for (; at < end; at += PANEL, x += 2 * R) {
            __builtin_prefetch((const char*)at + ahead, 0, 2);
            UNROLL for (int v = 0; v < NV; v++) {
                vec::F even, odd;
                vec::widen_float8(at + v * vec::LANES, even, odd);
                UNROLL for (int r = 0; r < R; r++) sums[r][v] = vec::fma(even, vec::set(x[r]), sums[r][v]);
                UNROLL for (int r = 0; r < R; r++) sums[r][v] = vec::fma(odd, vec::set(x[R + r]), sums[r][v]);
            }
        }
        keep_sums(c + first, sums);
    }
}

// Units of 8-bit floats, activations floats [units][columns][R].
template <int R>
void stream_float8(const Layout& layout, const Streams& streams, long from, long to, const char* activations) {
    const float* a = (const float*)activations;
    const long ahead = streams.fetch ? STREAM_AHEAD : 0, unit_pairs = layout.columns / 2;
    const long some = std::min(STREAM_RUN / (2 * PANEL), unit_pairs);  // pairs of columns, which divides a unit's
    const long run = streams.fetch ? some : unit_pairs;
    for (long u = from; u < to; u++) {
        float sums[STREAM_PANELS][R * PANEL] = {};
        const long unit = layout.offset_of(u);
        for (long pair = 0; pair < unit_pairs; pair += run, a += 2 * R * run)
            for (long i = 0; i < streams.num; i++) {
                const uint16_t* pairs = (const uint16_t*)(streams.packed[i] + unit + layout.quants);
                stream_pairs<R>(pairs + pair * PANEL, run, a, ahead, sums[i]);
            }
        for (long i = 0; i < streams.num; i++) {
            vec::F unscaled[R][2];
            load_sums(sums[i], unscaled);
            add_scaled(unscaled, (const float*)(streams.packed[i] + unit), streams.sums[i]);
        }
    }
}

// sums[r][v] += q of 16 NV channels of one group . q of the activations x; `low` and `high` are the channels' bits.
template <class P, int R, int NV>
INLINE void stream_dot(const Steps<P>& unpacked, const uint32_t* low, const uint32_t* high, const uint32_t* x,
                       int steps, long ahead, vec::I (&sums)[R][NV]) {
    typedef ByteDot<P::WIDTH> Dot;
    constexpr int BITS = P::BITS;
    constexpr int SPAN = SPAN_STEPS<BITS>, CHUNK = std::max({SPAN, Dot::FIT, 4});
    constexpr long LOW_WORDS = BITS == 8 ? SPAN * PANEL : SPAN / 2 * PANEL;
    for (int s = 0; s < steps; s += CHUNK, x += CHUNK * R * Dot::WORDS) {
        typename Dot::Partial partial[R][NV];
        for_constants(std::make_integer_sequence<int, CHUNK>{}, [&](auto i) {
            UNROLL for (int v = 0; v < NV; v++) {
                const uint32_t* word = low + (BITS == 8 ? 0 : i % SPAN / 2 * PANEL) + v * vec::LANES;
                if constexpr (BITS == 8 || i % 2 == 0)  // little by little: many at a time would hold up the loads
                    prefetch_lines((const char*)word + ahead, 64);
                if constexpr (high_bits(BITS) > 0 && i % SPAN == 0)
                    prefetch_lines((const char*)(high + v * vec::LANES) + ahead, 64);
                auto weights = Dot::weights(
                    unpacked.template step<i % SPAN>(low + v * vec::LANES, high + v * vec::LANES));
                UNROLL for (int r = 0; r < R; r++) {
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

// One unit times R rows of the group's activations, onto c [R][32]. The format comes by value: as no store can change it,
// it stays in registers.
template <class P, int R>
INLINE void stream_group(const Format f, const Steps<P> unpacked, const char* numbers, const char* offsets,
                         const char* quants, const BlockUnits& block,
                         const ActivationGroup& group, int steps, long ahead, float* c) {
    constexpr int NV = STREAM_VECTORS<R, P::BITS>;
    for (int first = 0; first < PANEL; first += NV * vec::LANES) {
        vec::I sums[R][NV];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::splat(group.starts + r);
        const uint32_t* low = (const uint32_t*)quants + first;
        stream_dot(unpacked, low, low + steps / 2 * PANEL, group.words, steps, ahead, sums);
        UNROLL for (int v = 0; v < NV; v++) {
            int channel = first + v * vec::LANES;
            vec::F scale = numbers_at(f.scales, numbers, block.scales, channel);
            vec::F offset = f.offsets == NONE ? vec::zero() : offset_at(f, offsets, block, channel, scale);
            UNROLL for (int r = 0; r < R; r++) {
                float* to = c + r * PANEL + channel;
                vec::F factor = vec::mul(scale, vec::set(group.scales[r]));
                vec::F sum = vec::fma(vec::to_float(sums[r][v]), factor, vec::load(to));
                if (f.offsets != NONE) sum = vec::fma(offset, vec::set(group.factors[r]), sum);
                vec::store(to, sum);
            }
        }
    }
    vec::forget_memory();
}

// Units of STEPS steps, or of any number of them for 0.
template <class P, int R, int STEPS>
INLINE void stream_units(const Layout l, const Streams s, long from, long to, const char* activations) {
    constexpr int WORDS = ByteDot<P::WIDTH>::WORDS;
    const int steps = STEPS ? STEPS : l.steps;
    const Steps<P> unpacked(l.format);
    const long group_bytes = R * activation_bytes(steps, WORDS), ahead = s.fetch ? STREAM_AHEAD : 0;
    BlockUnits blocks[STREAM_PANELS];
    auto start_block = [&](long header) {
        for (long i = 0; i < s.num; i++) blocks[i].set(l.format, s.packed[i] + header);
    };
    start_block(l.header_of(from));
    long unit = l.offset_of(from), left = l.block - from % l.block;  // units of the block
    for (long u = from; u < to; u++, left--, unit += l.unit_bytes, activations += group_bytes) {
        if (left == 0) left = l.block, start_block(unit), unit += l.block_header;
        const ActivationGroup group(activations, R);
        for (long i = 0; i < s.num; i++) {
            const char* at = s.packed[i] + unit;
            __builtin_prefetch(at + ahead, 0, 2);
            stream_group<P, R>(l.format, unpacked, at, at + l.offsets, at + l.quants, blocks[i], group, steps, ahead,
                               s.sums[i]);
        }
    }
}

template <class P, int R>
void stream_groups(const Layout& layout, const Streams& streams, long from, long to, const char* activations) {
    with_steps<P::WIDTH>(layout.steps, [&](auto steps) {
        stream_units<P, R, steps>(layout, streams, from, to, activations);
    });
}
