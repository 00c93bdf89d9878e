// Sixteen lanes of 32 bits, whatever the machine has: F holds floats, I int32 and W raw words (two bf16, one float or
// four bytes per lane). The level is chosen by the compiler's flags; every source is compiled once per level.
//
// Each level header defines, in namespace vec, the types F, I, W, and:
//   zero set load store stream add sub mul div fma max min sum max_lane scale2 round_to_int keep word splat as_float
//   to_float
//   dot_bf16 half_to_float low_halves high_halves low_nibbles high_nibbles keep_bits keep_lanes either shift shift_signed store_word
//   even_bytes odd_bytes add_dot_shorts look_up
//   FLOAT8_UNIT FLOAT8_X float8_place widen_float8
// and dot_bytes, or BLADE_DOT_BY_PAIRS and the steps of a dot product of bytes (byte_dot.h).
// What can be said in those terms for all levels is below.
#pragma once
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))
// Before every loop over an array of vectors: unrolled early it leaves constants as indices, and the array in registers.
#define UNROLL _Pragma("GCC unroll 16")

struct bf16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

namespace vec {
constexpr int LANES = 16;

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE void from_float(float x, float& out) { out = x; }
INLINE void from_float(float x, bf16& out) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t u;
    memcpy(&u, &x, 4);
    out.bits = (u & 0x7fffffff) > 0x7f800000 ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE float half_to_float(uint16_t h) {  // IEEE binary16: rebias by a multiplication, which normalises subnormals
    uint32_t u = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
    float f;
    memcpy(&f, &u, 4);
    f *= 0x1p112f;
    memcpy(&u, &f, 4);
    u |= sign | ((h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
    memcpy(&f, &u, 4);
    return f;
}
INLINE float to_float(half x) { return half_to_float(x.bits); }

INLINE uint16_t to_half(float x) {  // round to nearest, ties to even
    uint32_t u;
    memcpy(&u, &x, 4);
    uint16_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;   // NaN
    if (u >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
    if (u < 0x38800000) {  // subnormal: adding 0.5 leaves what a subnormal holds in the last bits of the sum
        float shifted;
        memcpy(&shifted, &u, 4);
        shifted += 0.5f;
        memcpy(&u, &shifted, 4);
        return sign | uint16_t(u - 0x3f000000);
    }
    return sign | uint16_t((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}

// e4m3 without infinities, a binary16 but for the bias of its exponent. NaN becomes a number.
INLINE float float8_to_float(uint8_t b) { return half_to_float(uint16_t((b & 0x80) << 8 | (b & 0x7f) << 7)) * 256; }
}  // namespace vec

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace vec {
// Between two turns of a loop that adds onto an array in memory. With AVX-512 GCC would else keep a copy of it, which does
// not fit the registers, on the stack.
INLINE void forget_memory() {
#ifdef __AVX512F__
    asm volatile("" ::: "memory");
#endif
}

// Activations times FLOAT8_X meet 8-bit floats divided by FLOAT8_UNIT, so that products are far from both ends of what
// float32 holds; scales make good the rest.
constexpr float FLOAT8_SCALE = FLOAT8_UNIT / FLOAT8_X;

// The first n < 16 elements; the other lanes are 0 and are not touched in memory.
template <class E>
INLINE F load_n(const E* p, long n) {
    E lanes[LANES] = {};
    memcpy(lanes, p, n * sizeof(E));
    return load(lanes);
}

template <class E>
INLINE void store_n(E* p, F x, long n) {
    E lanes[LANES];
    store(lanes, x);
    memcpy(p, lanes, n * sizeof(E));
}

// Calls body(offset, lanes) over n elements, 16 at a time and a shorter rest.
template <class Body>
INLINE void for_lanes(long n, Body body) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) body(i, LANES);
    if (i < n) body(i, int(n - i));
}

template <class E>
INLINE F load_some(const E* p, int lanes) {
    return lanes == LANES ? load(p) : load_n(p, lanes);
}

template <class E>
INLINE void store_some(E* p, F x, int lanes) {
    if (lanes == LANES)
        store(p, x);
    else
        store_n(p, x, lanes);
}

// e^x to about 1 ulp (Cephes' expf): x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial in r.
INLINE F exp(F x) {
    x = max(set(-87.3f), sub(zero(), max(set(-88.3f), sub(zero(), x))));
    F n = round_to_int(mul(x, set(1.44269504f)));
    F r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
    F p = fma(set(1.9875691500e-4f), r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    return scale2(fma(mul(p, r), r, add(r, set(1.0f))), n);
}

INLINE F sigmoid(F x) { return div(set(1.0f), add(set(1.0f), exp(sub(zero(), x)))); }
INLINE F silu(F x) { return div(x, add(set(1.0f), exp(sub(zero(), x)))); }
}  // namespace vec
