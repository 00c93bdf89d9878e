// The one inner loop: R rows of activations against NV vectors of 16 channels, a 32-bit word of K per lane and step.
#pragma once
#include "vec.h"

// What a word holds, and how a step accumulates it. The order along K is the same for every R, so a row's result does
// not depend on the rows beside it.
template <class E>
struct Word;
template <>
struct Word<float> {
    typedef vec::F Acc;
    static constexpr int ELEMENTS = 1;
    INLINE Acc dot(Acc c, vec::W w, vec::W a) { return vec::fma(vec::as_float(w), vec::as_float(a), c); }
};
template <>
struct Word<bf16> {
    typedef vec::F Acc;
    static constexpr int ELEMENTS = 2;
    INLINE Acc dot(Acc c, vec::W w, vec::W a) { return vec::dot_bf16(c, w, a); }
};

// Where to prefetch from: two lines per step, then `stride` bytes on.
struct Prefetch {
    const char* at;
    long stride;
    INLINE void step(Prefetch& p) {
        __builtin_prefetch(p.at, 0, 2);
        __builtin_prefetch(p.at + 64, 0, 2);
        p.at += p.stride;
    }
};

// c[r][v] += sum over steps of w[v][step] . a[r][step]; words of a lie `a_row` apart between rows, `a_step` between
// steps; w advances w_step words per step.
template <class E, int R, int NV>
INLINE void dot_tile(const uint32_t* a, long a_row, long a_step, const uint32_t* const (&w)[NV], long w_step,
                     long steps, typename Word<E>::Acc (&c)[R][NV], Prefetch& prefetch) {
    for (long s = 0; s < steps; s++) {
        Prefetch::step(prefetch);
        vec::W weights[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) weights[v] = vec::word(w[v] + s * w_step);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            vec::W activation = vec::splat(a + r * a_row + s * a_step);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) c[r][v] = Word<E>::dot(c[r][v], weights[v], activation);
        }
    }
}

// Calls body with the compile-time constant `rows`, 1 <= rows <= MAX_ROWS.
template <int R>
struct Rows {
    static constexpr int value = R;
};
template <int R = vec::MAX_ROWS, class Body>
INLINE void with_rows(long rows, Body body) {
    if (rows == R)
        body(Rows<R>{});
    else if constexpr (R > 1)
        with_rows<R - 1>(rows, body);
}
