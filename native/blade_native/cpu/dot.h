// Attention's inner loop: R rows of activations against NV vectors of 16 channels, a 32-bit word of K per lane and step.
#pragma once
#include "kv_chunk.h"
#include "tile_shape.h"

// What a word of the cache holds, and how a step accumulates it in PARTS. The order along K is the same for every R, so
// a row's result does not depend on the rows beside it.
template <class E>
struct Word;
template <>
struct Word<float> {
    typedef float Activation;
    typedef vec::F Sum;
    static constexpr int ELEMENTS = 1, PARTS = 1;
    template <int I>
    INLINE vec::W part(vec::W w) { return w; }
    INLINE vec::W first_element(vec::W w) { return w; }
    INLINE vec::F dot(vec::F c, vec::W w, vec::W a) { return vec::fma(vec::as_float(w), vec::as_float(a), c); }
};
template <>
struct Word<bf16> {
    typedef vec::F Sum;
    static constexpr int ELEMENTS = 2;
#ifdef __AVX512BF16__
    typedef bf16 Activation;
    static constexpr int PARTS = 1;
    template <int I>
    INLINE vec::W part(vec::W w) { return w; }
    INLINE vec::W first_element(vec::W w) { return vec::low_halves(w); }
    INLINE vec::F dot(vec::F c, vec::W w, vec::W a) { return vec::dot_bf16(c, w, a); }
#else  // no instruction multiplies bf16: both operands are floats
    typedef float Activation;
    static constexpr int PARTS = 2;
    template <int I>
    INLINE vec::W part(vec::W w) { return I ? vec::high_halves(w) : vec::shift<16>(w); }
    INLINE vec::W first_element(vec::W w) { return vec::shift<16>(w); }
    INLINE vec::F dot(vec::F c, vec::W w, vec::W a) { return vec::fma(vec::as_float(w), vec::as_float(a), c); }
#endif
};
template <>
struct Word<Code8> {  // exact: activations have 16 bits, and 256 products of 2^15 * 255 fit a Sum
    typedef int16_t Activation;
    typedef vec::I Sum;
    static constexpr int ELEMENTS = 4, PARTS = 2;
    template <int I>
    INLINE vec::W part(vec::W w) { return I ? vec::odd_bytes(w) : vec::even_bytes(w); }
    INLINE vec::I dot(vec::I c, vec::W w, vec::W a) { return vec::add_dot_shorts(c, w, a); }
};
template <>
struct Word<Code4> {
    typedef int16_t Activation;
    typedef vec::I Sum;
    static constexpr int ELEMENTS = 8, PARTS = 4;
    template <int I>
    INLINE vec::W part(vec::W w) { return vec::keep_lanes(I ? vec::shift<-4 * I>(w) : w, 0x000f000f); }
    INLINE vec::I dot(vec::I c, vec::W w, vec::W a) { return vec::add_dot_shorts(c, w, a); }
};
template <int STORAGE, int EXPONENT, int TOP>
struct Word<Code8Float<STORAGE, EXPONENT, TOP>> {  // bits are moved to where float32 has them: UNITs
    typedef float Activation;
    typedef vec::F Sum;
    static constexpr int ELEMENTS = 4, PARTS = 4;
    template <int I>
    INLINE vec::W part(vec::W w) {
        w = vec::shift_signed<8 - EXPONENT>(I == 3 ? w : vec::shift<24 - 8 * I>(w));
        return vec::keep_lanes(w, 0x80000000 | 0x7f << (16 + EXPONENT));
    }
    INLINE vec::F dot(vec::F c, vec::W w, vec::W a) { return vec::fma(vec::as_float(w), vec::as_float(a), c); }
};

template <class E, int I, int R, int NV>
INLINE void dot_parts(const uint32_t* a, long a_row, long a_step, vec::W word, int v, typename Word<E>::Sum (&c)[R][NV]) {
    vec::W part = Word<E>::template part<I>(word);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) c[r][v] = Word<E>::dot(c[r][v], part, vec::splat(a + r * a_row));
    if constexpr (I + 1 < Word<E>::PARTS) dot_parts<E, I + 1>(a + a_step, a_row, a_step, word, v, c);
}

// The same for two vectors, which share what is read of the rows: a load for each product would be what binds.
template <class E, int I, int R>
INLINE void dot_pair(const uint32_t* a, long a_row, long a_step, vec::W w0, vec::W w1, typename Word<E>::Sum (&c)[R][2]) {
    vec::W part0 = Word<E>::template part<I>(w0), part1 = Word<E>::template part<I>(w1);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        vec::W x = vec::splat(a + r * a_row);
        c[r][0] = Word<E>::dot(c[r][0], part0, x);
        c[r][1] = Word<E>::dot(c[r][1], part1, x);
    }
    if constexpr (I + 1 < Word<E>::PARTS) dot_pair<E, I + 1>(a + a_step, a_row, a_step, w0, w1, c);
}

// c[r][v] += sum over steps of w[v][step] . a[r][step]; words of a lie `a_row` apart between rows, `a_step` between
// the parts of steps; w advances w_step words per step. With few rows one word at a time is held, for sixteen registers hold no more.
// For each line that is read one of `ahead` is fetched: as many as there are in flight at a time, and no burst of them.
template <class E, int R, int NV>
INLINE void dot_tile(const uint32_t* a, long a_row, long a_step, const uint32_t* const (&w)[NV], long w_step,
                     long steps, const char* const (&ahead)[NV], typename Word<E>::Sum (&c)[R][NV]) {
    for (long s = 0; s < steps; s++, a += Word<E>::PARTS * a_step) {
        for (int v = 0; v < NV; v++) __builtin_prefetch(ahead[v] + s * 64, 0, 2);
        if constexpr (NV == 2 && R > 2) {
            dot_pair<E, 0>(a, a_row, a_step, vec::word(w[0] + s * w_step), vec::word(w[1] + s * w_step), c);
        } else {
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) dot_parts<E, 0>(a, a_row, a_step, vec::word(w[v] + s * w_step), v, c);
        }
    }
}

// Calls body with the compile-time constant `rows`, 1 <= rows <= MAX_TILE_ROWS.
template <int R>
struct Rows {
    static constexpr int value = R;
};
template <int R = MAX_TILE_ROWS, class Body>
INLINE void with_rows(long rows, Body body) {
    if (rows == R)
        body(Rows<R>{});
    else if constexpr (R > 1)
        with_rows<R - 1>(rows, body);
}
