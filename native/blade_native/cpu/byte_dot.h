// Dot products of unsigned weights below 2^BITS with signed bytes, a step of four numbers per 32-bit lane, as each level
// does them fastest. Where no instruction does a whole step:
//   8 bits     even and odd bytes are widened to int16 once per tile (activations are stored so), products are summed in
//              int32: two multiplications and two additions per step
//   4 to 6 bits  pairs of products are summed in int16, where FIT steps fit (8 * 2 * 15 * 127 < 2^15) before they have to
//              be flushed into int32: half the work of 8 bits
#pragma once
#include "vec.h"

#ifndef BLADE_DOT_BY_PAIRS
template <int BITS>
struct ByteDot {
    static constexpr int FIT = 0;    // steps whose sums fit a Partial; 0: they go straight to int32
    static constexpr int WORDS = 1;  // of an activation per step
    typedef vec::W Weights;
    typedef vec::W Partial;  // none
    INLINE Weights weights(vec::W bytes) { return bytes; }
    INLINE vec::I dot(vec::I c, Weights w, const uint32_t* x) { return vec::dot_bytes(c, w, vec::splat(x)); }
};
#else
template <int BITS>
struct ByteDot {
    static constexpr int FIT = 8 >> (BITS - 4);
    static constexpr int WORDS = 1;
    typedef vec::W Weights;
    typedef vec::W Partial;
    INLINE Weights weights(vec::W bytes) { return bytes; }
    INLINE Partial first(Weights w, const uint32_t* x) { return vec::dot_bytes(w, vec::splat(x)); }
    INLINE Partial dot(Partial c, Weights w, const uint32_t* x) { return vec::add_dot_bytes(c, w, vec::splat(x)); }
    INLINE vec::I flush(vec::I c, Partial p) { return vec::add_dot_shorts(c, p, vec::one_shorts()); }
};
template <>
struct ByteDot<8> {
    static constexpr int FIT = 0;
    static constexpr int WORDS = 2;  // the even bytes as int16, then the odd ones
    struct Weights {
        vec::W even, odd;
    };
    typedef vec::W Partial;  // none
    INLINE Weights weights(vec::W bytes) { return {vec::even_bytes(bytes), vec::odd_bytes(bytes)}; }
    INLINE vec::I dot(vec::I c, Weights w, const uint32_t* x) {
        c = vec::add_dot_shorts(c, w.even, vec::splat(x));
        return vec::add_dot_shorts(c, w.odd, vec::splat(x + 1));
    }
};
#endif

// Four int8 of a step, in a word, as ByteDot takes them.
template <int WORDS>
INLINE void put_step(uint32_t word, uint32_t* to) {
    if constexpr (WORDS == 1) {
        *to = word;
    } else {
        auto widened = [word](int byte) { return uint32_t(uint16_t(int8_t(word >> 8 * byte))); };
        to[0] = widened(0) | widened(2) << 16;
        to[1] = widened(1) | widened(3) << 16;
    }
}
