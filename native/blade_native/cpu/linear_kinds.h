// The weight formats of a packed linear. Each says what a *unit* of K is, how a panel and an activation tile store it,
// and how a tile of R rows accumulates units:
//   dense   unit = one word of K.   panel: [units][32] words.              tile: [units][R] words
//   int8    unit = a group of 64.   panel: [units]{32 half scales, [16][32] words}           of w + 128
//   int4    unit = a group of 32.   panel: [units]{32 half scales, 32 half minima, [4][32] words}, w = scale * q + min,
//           the low nibbles of a word are one step, the high nibbles the next
//   grouped activations: [units]{[R] scales, [R] sums, [group / 4][R] words}, quantised per row and group to int8
#pragma once
#include "api.h"
#include "dot.h"

constexpr int PANEL = 32;  // output channels

template <class E>
struct Dense {
    static constexpr long UNIT = Word<E>::ELEMENTS;
    static constexpr long PANEL_BYTES = PANEL * 4;  // per unit
    static constexpr long ROW_BYTES = 4;            // per unit and row of an activation tile

    // rows x units words become [units][R].
    template <class X>
    static void pack_tile(const X* x, long k, int rows, char* tile) {
        uint32_t* out = (uint32_t*)tile;
        for (int r = 0; r < rows; r++) {
            const X* row = x + r * k;
            for (long u = 0; u < k / UNIT; u++) memcpy(out + u * rows + r, row + u * UNIT, 4);
        }
    }

    template <int R>
    INLINE void accumulate(const char* a, const char* w, long units, vec::F (&c)[R][2], Prefetch prefetch) {
        const uint32_t* weights[2] = {(const uint32_t*)w, (const uint32_t*)w + vec::LANES};
        dot_tile<E, R, 2>((const uint32_t*)a, 1, R, weights, PANEL, units, c, prefetch);
    }
};

// Quantises one group of one row to int8: x ~ scale * q with |q| <= 127. Writes q's words `stride` words apart.
template <class X, int GROUP>
INLINE void quantize_group(const X* x, float& scale, float& sum, uint32_t* words, int stride) {
    vec::F most = vec::zero(), least = vec::zero();
    for (int i = 0; i < GROUP; i += vec::LANES) {
        vec::F v = vec::load(x + i);
        most = vec::max(most, v);
        least = vec::max(least, vec::sub(vec::zero(), v));
    }
    float bound = vec::max_lane(vec::max(most, least));
    vec::F inverse = vec::set(bound > 0 ? 127.0f / bound : 0.0f);
    int total = 0;
    for (int i = 0; i < GROUP; i += vec::LANES) {
        float rounded[vec::LANES];
        int8_t q[vec::LANES];
        vec::store(rounded, vec::round_to_int(vec::mul(vec::load(x + i), inverse)));
        for (int j = 0; j < vec::LANES; j++) total += q[j] = int8_t(rounded[j]);
        for (int j = 0; j < vec::LANES / 4; j++) memcpy(words + (i / 4 + j) * stride, q + 4 * j, 4);
    }
    scale = bound / 127.0f;
    sum = float(total);
}

template <int BITS>
struct Grouped {
    static constexpr int UNIT = BITS == 8 ? 64 : 32;
    static constexpr int STEPS = UNIT / 4;
    static constexpr long HEADER = BITS == 8 ? 64 : 128;  // bytes of scales (and minima) per panel and unit
    static constexpr long PANEL_BYTES = HEADER + UNIT * PANEL * BITS / 8;
    static constexpr long ROW_BYTES = 8 + UNIT;

    template <class X>
    static void pack_tile(const X* x, long k, int rows, char* tile) {
        for (long u = 0; u < k / UNIT; u++, tile += rows * ROW_BYTES)
            for (int r = 0; r < rows; r++) {
                float* scales = (float*)tile;
                quantize_group<X, UNIT>(x + r * k + u * UNIT, scales[r], scales[rows + r],
                                        (uint32_t*)tile + 2 * rows + r, rows);
            }
    }

    template <int R>
    INLINE void dot_unit(const uint32_t* a, const uint32_t* w, vec::I (&c)[R][2], Prefetch& prefetch) {
        if constexpr (BITS == 8) {
            const uint32_t* weights[2] = {w, w + vec::LANES};
            dot_tile<uint8_t, R, 2>(a, 1, R, weights, PANEL, STEPS, c, prefetch);
        } else {
            for (int s = 0; s < STEPS; s += 2, w += PANEL) {
                Prefetch::step(prefetch);
                vec::W words[2] = {vec::word(w), vec::word(w + vec::LANES)};
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    vec::W q[2];
                    for (int v = 0; v < 2; v++) q[v] = half ? vec::high_nibbles(words[v]) : vec::low_nibbles(words[v]);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) {
                        vec::W activation = vec::splat(a + (s + half) * R + r);
                        for (int v = 0; v < 2; v++) c[r][v] = vec::dot_bytes(c[r][v], q[v], activation);
                    }
                }
            }
        }
    }

    template <int R>
    INLINE void accumulate(const char* a, const char* w, long units, vec::F (&c)[R][2], Prefetch prefetch) {
        for (long u = 0; u < units; u++, a += R * ROW_BYTES, w += PANEL_BYTES) {
            const float *scales = (const float*)a, *sums = scales + R;
            vec::I dots[R][2];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < 2; v++) dots[r][v] = vec::set_int(BITS == 8 ? -128 * int(sums[r]) : 0);
            dot_unit<R>((const uint32_t*)(sums + R), (const uint32_t*)(w + HEADER), dots, prefetch);
            for (int v = 0; v < 2; v++) {
                vec::F scale = vec::half_to_float(w + 32 * v);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++)
                    c[r][v] = vec::fma(vec::to_float(dots[r][v]), vec::mul(scale, vec::set(scales[r])), c[r][v]);
                if constexpr (BITS == 4) {
                    vec::F least = vec::half_to_float(w + 64 + 32 * v);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) c[r][v] = vec::fma(least, vec::set(scales[r] * sums[r]), c[r][v]);
                }
            }
        }
    }
};
