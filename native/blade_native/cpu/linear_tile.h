// The inner loops of linears: a tile of R rows of activations times a slice of a panel of 32 channels, accumulated onto
// floats c [R][32]. Products are summed in the order of K whatever R is, so a row does not depend on its tile.
#pragma once
#include <type_traits>

#include "byte_dot.h"
#include "linear_format.h"
#include "tile_shape.h"

// Units of one panel, ready to be multiplied.
struct Slice {
    // dense: [units][32] floats or bf16 words. Per unit, grouped: [steps][32] words of bytes; 8-bit: [columns][32] floats
    const char* words;
    long stride;           // bytes from unit to unit
    const float *scales, *offsets;  // grouped and 8-bit floats: [units][32]; offsets may be null
    long units;
    int steps, groups;  // of a unit
    long columns;       // 8-bit floats: of a unit
};

// c[r][v] += scale * sum.
template <int R, int NV>
INLINE void add_scaled(const vec::F (&sums)[R][NV], const float* scales, float* c) {
    UNROLL for (int v = 0; v < NV; v++) {
        vec::F scale = vec::load(scales + v * vec::LANES);
        UNROLL for (int r = 0; r < R; r++) {
            float* to = c + r * PANEL + v * vec::LANES;
            vec::store(to, vec::fma(sums[r][v], scale, vec::load(to)));
        }
    }
}

typedef void (*Tile)(const Slice& slice, const char* activations, float* c);

// Activations [units][R] words.
template <class E, int R>
void dense_tile(const Slice& slice, const char* activations, float* c) {
    constexpr int NV = TILE_VECTORS<R>;
    for (int first = 0; first < PANEL; first += NV * vec::LANES) {
        const uint32_t *w = (const uint32_t*)slice.words + first, *a = (const uint32_t*)activations;
        vec::F sums[R][NV];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::load(c + r * PANEL + first + v * vec::LANES);
        for (long u = 0; u < slice.units; u++, w += PANEL, a += R) {
            vec::W weights[NV];
            UNROLL for (int v = 0; v < NV; v++) weights[v] = vec::word(w + v * vec::LANES);
            UNROLL for (int r = 0; r < R; r++) {
                vec::W activation = vec::splat(a + r);
                UNROLL for (int v = 0; v < NV; v++) sums[r][v] = E::dot(sums[r][v], weights[v], activation);
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < NV; v++) vec::store(c + r * PANEL + first + v * vec::LANES, sums[r][v]);
    }
}

// 8-bit floats widened, activations [units][columns][R]: each unit's sum is scaled as a whole.
template <int R>
void float8_tile(const Slice& slice, const char* activations, float* c) {
    constexpr int NV = TILE_VECTORS<R>;
    for (long u = 0; u < slice.units; u++, activations += 4L * R * slice.columns)
        for (int first = 0; first < PANEL; first += NV * vec::LANES) {
            const float *w = (const float*)(slice.words + u * slice.stride) + first, *a = (const float*)activations;
            vec::F sums[R][NV];
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::zero();
            for (long i = 0; i < slice.columns; i++, w += PANEL, a += R) {
                vec::F weights[NV];
                UNROLL for (int v = 0; v < NV; v++) weights[v] = vec::load(w + v * vec::LANES);
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::fma(weights[v], vec::set(a[r]), sums[r][v]);
            }
            add_scaled(sums, slice.scales + u * PANEL + first, c + first);
        }
}

// What one unit of a tile's rows looks like: {[R] scales, [R] starts of the sum, [groups][R] factors of the offsets,
// [steps][R][WORDS] words of int8 activations, or [R][steps] for AMX}. x ~ scale * q, factor = scale * sum of q, or that sum
// for nested weights.
struct ActivationGroup {
    const float* scales;
    const int32_t* starts;
    const float* factors;
    const uint32_t* words;
    ActivationGroup(const char* at, int rows, int groups = 1)
        : scales((const float*)at), starts((const int32_t*)at + rows), factors((const float*)at + 2 * rows),
          words((const uint32_t*)at + (2 + groups) * rows) {}
};
INLINE long activation_bytes(int steps, int words, int groups = 1) { return 8 + 4 * (groups + long(steps) * words); }  // of a row

// The integer sums of one group: sums[r][v] += q of the weights . q of the activations.
template <int BITS, int R, int NV>
INLINE void dot_group(const uint32_t* w, const uint32_t* x, int steps, vec::I (&sums)[R][NV]) {
    typedef ByteDot<BITS> Dot;
    auto step = [&](int s, auto body) {  // body(r, v, weights, activation)
        typename Dot::Weights weights[NV];
        UNROLL for (int v = 0; v < NV; v++) weights[v] = Dot::weights(vec::word(w + s * PANEL + v * vec::LANES));
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < NV; v++) body(r, v, weights[v], x + (s * R + r) * Dot::WORDS);
    };
    if constexpr (Dot::FIT == 0) {
        int s = 0;
        do {
            __builtin_prefetch((const char*)(x + s * R) + TILE_AHEAD, 0, 3);
            step(s, [&](int r, int v, auto w, auto x) { sums[r][v] = Dot::dot(sums[r][v], w, x); });
        }
        while (++s < steps);
    } else {
        for (int s = 0; s < steps; s += Dot::FIT) {
            typename Dot::Partial partial[R][NV];
            step(s, [&](int r, int v, auto w, auto x) { partial[r][v] = Dot::first(w, x); });
#pragma GCC unroll 8
            for (int i = 1; i < Dot::FIT; i++)
                step(s + i, [&](int r, int v, auto w, auto x) { partial[r][v] = Dot::dot(partial[r][v], w, x); });
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < NV; v++) sums[r][v] = Dot::flush(sums[r][v], partial[r][v]);
        }
    }
}

// to += a row's integer sum with sixteen channels, scaled as both are; and their offsets, where there are any, times its factor.
template <bool OFFSETS>
INLINE void add_group(vec::I sum, vec::F scale, vec::F offset, vec::F row_scale, vec::F row_factor, float* to) {
    vec::F scaled = vec::fma(vec::to_float(sum), vec::mul(scale, row_scale), vec::load(to));
    if constexpr (OFFSETS) scaled = vec::fma(offset, row_factor, scaled);
    vec::store(to, scaled);
}

// Calls body(constant) with a group's steps, or 0 for what is too long to be worth code of its own: knowing them keeps the
// sums of a short group in registers, where no instruction does a whole step, and elsewhere is worth 5 % to weights of few bits.
template <int BITS, class Body>
INLINE void with_steps(int steps, Body body) {
    constexpr int FIT = ByteDot<BITS>::FIT;
    if constexpr (FIT > 0 && FIT <= 4)
        if (steps == 4) return body(std::integral_constant<int, 4>{});
    if constexpr (FIT > 0 || BITS < 8)
        if (steps == 8) return body(std::integral_constant<int, 8>{});
    body(std::integral_constant<int, 0>{});
}

// Units of STEPS steps, or of any number of them for 0.
template <int BITS, int R, int STEPS, bool OFFSETS>
INLINE void byte_units(const Slice slice, const char* activations, float* c) {
    constexpr int NV = TILE_VECTORS<R>, WORDS = ByteDot<BITS>::WORDS;
    const int steps = STEPS ? STEPS : slice.steps;
    const long group_bytes = R * activation_bytes(steps, WORDS, slice.groups);
    for (long u = 0; u < slice.units; u++) {
        const ActivationGroup group(activations + u * group_bytes, R, slice.groups);
        for (int first = 0; first < PANEL; first += NV * vec::LANES) {
            vec::I sums[R][NV];
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < NV; v++) sums[r][v] = vec::splat(group.starts + r);
            dot_group<BITS>((const uint32_t*)(slice.words + u * slice.stride) + first, group.words, steps, sums);
            UNROLL for (int v = 0; v < NV; v++) {
                long at = u * PANEL + first + v * vec::LANES;
                vec::F scale = vec::load(slice.scales + at);
                vec::F offset = OFFSETS ? vec::load(slice.offsets + at) : vec::zero();
                UNROLL for (int r = 0; r < R; r++)
                    add_group<OFFSETS>(sums[r][v], scale, offset, vec::set(group.scales[r]), vec::set(group.factors[r]),
                                       c + r * PANEL + first + v * vec::LANES);
            }
            vec::forget_memory();
        }
    }
}

template <int BITS, int R>
void byte_tile(const Slice& slice, const char* activations, float* c) {
    with_steps<BITS>(slice.steps, [&](auto steps) {
        if (slice.offsets)
            byte_units<BITS, R, steps, true>(slice, activations, c);
        else
            byte_units<BITS, R, steps, false>(slice, activations, c);
    });
}

struct F32 {
    INLINE vec::F dot(vec::F c, vec::W w, vec::W a) { return vec::fma(vec::as_float(w), vec::as_float(a), c); }
};
struct BF16 {
    INLINE vec::F dot(vec::F c, vec::W w, vec::W a) { return vec::dot_bf16(c, w, a); }
};

// The function for `rows` rows, 1 to MOST: Kind<R>::tile.
template <template <int> class Kind, class Function, int MOST = MAX_TILE_ROWS>
Function tile_of(int rows) {
    if constexpr (MOST > 1)
        if (rows < MOST) return tile_of<Kind, Function, MOST - 1>(rows);
    return Kind<MOST>::tile;
}
