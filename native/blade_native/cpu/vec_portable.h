// GCC vector extensions of 128 bits, which become SSE2, NEON or whatever the compiler's target has.
#pragma once
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace vec {
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
struct F {
    F4 v[4];
};
struct I {
    I4 v[4];
};
typedef I W;

// Applies an expression of q = 0..3 to the four quarters.
#define QUARTERS(T, expression) \
    T out; \
    _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++) out.v[q] = (expression); \
    return out;

INLINE F4 bits_to_float(I4 x) { return (F4)x; }
INLINE F set(float x) { QUARTERS(F, (F4{x, x, x, x})) }
INLINE I set_int(int x) { QUARTERS(I, (I4{x, x, x, x})) }
INLINE F zero() { return set(0.0f); }
INLINE F load(const float* p) {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
}
template <class E>
INLINE F load(const E* p) {  // of bf16, uint8_t or int8_t
    float lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = to_float(p[i]);
    return load(lanes);
}
INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
INLINE void stream(float* p, F x) { store(p, x); }
INLINE void store(bf16* p, F x) {
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; i++) from_float(lanes[i], p[i]);
}
INLINE F add(F a, F b) { QUARTERS(F, a.v[q] + b.v[q]) }
INLINE void store(int8_t* p, F x) {  // whole numbers that fit; others become any
    uint32_t lanes[LANES];           // 1.5 * 2^23 + x has x in its last bits
    x = add(x, set(12582912.0f));
    memcpy(lanes, &x, sizeof x);
    for (int i = 0; i < LANES; i++) p[i] = int8_t(lanes[i]);
}
INLINE void store(int16_t* p, F x) {  // whole numbers that fit
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; i++) p[i] = int16_t(lanes[i]);
}
INLINE I add(I a, I b) { QUARTERS(I, a.v[q] + b.v[q]) }
INLINE F sub(F a, F b) { QUARTERS(F, a.v[q] - b.v[q]) }
INLINE F mul(F a, F b) { QUARTERS(F, a.v[q] * b.v[q]) }
INLINE F div(F a, F b) { QUARTERS(F, a.v[q] / b.v[q]) }
INLINE F fma(F a, F b, F c) { QUARTERS(F, a.v[q] * b.v[q] + c.v[q]) }
INLINE F max(F a, F b) { QUARTERS(F, a.v[q] > b.v[q] ? a.v[q] : b.v[q]) }
INLINE F min(F a, F b) { QUARTERS(F, a.v[q] < b.v[q] ? a.v[q] : b.v[q]) }
INLINE float sum(F x) {
    F4 s = (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]);
    return (s[0] + s[1]) + (s[2] + s[3]);
}
INLINE float max_lane(F x) {
    float lanes[LANES], most;
    store(lanes, x);
    most = lanes[0];
    for (int i = 1; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}
INLINE F round_to_int(F x) {  // |x| < 2^22: adding 1.5 * 2^23 drops the fraction
    F magic = set(12582912.0f);
    return sub(add(x, magic), magic);
}
INLINE F scale2(F x, F n) {
    QUARTERS(F, x.v[q] * bits_to_float((__builtin_convertvector(n.v[q], I4) + 127) << 23))
}
// Lanes [from, to) of x, the others become `other`.
INLINE F keep(F x, int from, int to, float other) {
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; i++) lanes[i] = i >= from && i < to ? lanes[i] : other;
    return load(lanes);
}

INLINE W word(const void* p) {
    W w;
    memcpy(&w, p, sizeof w);
    return w;
}
INLINE W splat(const void* p) {
    int32_t w;
    memcpy(&w, p, 4);
    return set_int(w);
}
INLINE W low_halves(W w) { QUARTERS(W, w.v[q] & 0xffff) }
INLINE W high_halves(W w) { QUARTERS(W, w.v[q] & -65536) }
INLINE W low_nibbles(W w) { QUARTERS(W, w.v[q] & 0x0f0f0f0f) }
INLINE W keep_bits(W w, int byte) { QUARTERS(W, w.v[q] & byte * 0x01010101) }
INLINE W either(W x, W y) { QUARTERS(W, x.v[q] | y.v[q]) }
// Every lane shifted left by N bits, or right by -N (the sign comes along).
template <int N>
INLINE W shift(W w) {
    if constexpr (N < 0) {
        QUARTERS(W, w.v[q] >> -N)
    } else {
        QUARTERS(W, w.v[q] << N)
    }
}
INLINE W keep_lanes(W w, uint32_t mask) { QUARTERS(W, w.v[q] & int32_t(mask)) }
// Every lane shifted right by N bits, its sign coming along.
template <int N>
INLINE W shift_signed(W w) { QUARTERS(W, w.v[q] >> N) }
INLINE void store_word(void* p, W w) { memcpy(p, &w, sizeof w); }
INLINE W high_nibbles(W w) { QUARTERS(W, (w.v[q] >> 4) & 0x0f0f0f0f) }
// Byte i of the table for each byte i < 16 of w.
typedef const uint8_t* Table;
INLINE Table table(const uint8_t* p) { return p; }
INLINE W look_up(Table t, W w) {
    uint8_t bytes[4 * LANES];
    memcpy(bytes, &w, sizeof w);
    for (uint8_t& each : bytes) each = t[each];
    memcpy(&w, bytes, sizeof w);
    return w;
}
INLINE F as_float(W w) { QUARTERS(F, bits_to_float(w.v[q])) }
INLINE F to_float(I x) { QUARTERS(F, __builtin_convertvector(x.v[q], F4)) }
INLINE F half_to_float(const void* p) {
    uint16_t halves[LANES];
    float lanes[LANES];
    memcpy(halves, p, sizeof halves);
    for (int i = 0; i < LANES; i++) lanes[i] = half_to_float(halves[i]);
    return load(lanes);
}
// Sixteen pairs of 8-bit floats (float8_to_float), divided by FLOAT8_UNIT: the first ones, and the second ones.
constexpr float FLOAT8_UNIT = 0x1p8f, FLOAT8_X = 1;
INLINE int float8_place(int channel) { return channel; }  // of its pair among the sixteen
INLINE void widen_float8(const uint16_t* p, F& first, F& second) {
    float lanes[2][LANES];
    for (int i = 0; i < LANES; i++) {
        lanes[0][i] = float8_to_float(uint8_t(p[i])) / FLOAT8_UNIT;
        lanes[1][i] = float8_to_float(uint8_t(p[i] >> 8)) / FLOAT8_UNIT;
    }
    first = load(lanes[0]), second = load(lanes[1]);
}

INLINE F dot_bf16(F c, W w, W a) {
    const I4 high = I4{-65536, -65536, -65536, -65536};
    QUARTERS(F, c.v[q] + bits_to_float(w.v[q] << 16) * bits_to_float(a.v[q] << 16) +
                    bits_to_float(w.v[q] & high) * bits_to_float(a.v[q] & high))
}
INLINE I4 byte(I4 x, int i) { return (x << (24 - 8 * i)) >> 24; }
// c + sum over the four bytes of w (unsigned) times a (signed); exact.
INLINE I dot_bytes(I c, W w, W a) {
    QUARTERS(I, c.v[q] + (byte(w.v[q], 0) & 0xff) * byte(a.v[q], 0) + (byte(w.v[q], 1) & 0xff) * byte(a.v[q], 1) +
                    (byte(w.v[q], 2) & 0xff) * byte(a.v[q], 2) + (byte(w.v[q], 3) & 0xff) * byte(a.v[q], 3))
}
INLINE W even_bytes(W w) { QUARTERS(W, w.v[q] & 0x00ff00ff) }
INLINE W odd_bytes(W w) { QUARTERS(W, (w.v[q] >> 8) & 0x00ff00ff) }
// c + sums of two products of int16, in int32.
INLINE I add_dot_shorts(I c, W w, W a) {
#ifdef __SSE2__
    QUARTERS(I, c.v[q] + (I4)_mm_madd_epi16((__m128i)w.v[q], (__m128i)a.v[q]))
#else
    QUARTERS(I, c.v[q] + (w.v[q] << 16 >> 16) * (a.v[q] << 16 >> 16) + (w.v[q] >> 16) * (a.v[q] >> 16))
#endif
}
#undef QUARTERS
}  // namespace vec
