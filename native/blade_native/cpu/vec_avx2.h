// AVX2 + FMA + F16C: sixteen lanes are two registers.
#pragma once
#include <immintrin.h>

namespace vec {
struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
typedef I W;

INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE I set_int(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE __m256 widen(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE F load(const bf16* p) { return {widen(p), widen(p + 8)}; }
INLINE F load(const uint8_t* p) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
INLINE F load(const int8_t* p) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE void stream(float* p, F x) {  // past the caches; p is aligned to 64 bytes
    _mm256_stream_ps(p, x.a);
    _mm256_stream_ps(p + 8, x.b);
}
INLINE __m256i narrow(__m256 x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
}
INLINE void store(bf16* p, F x) {
    __m256i both = _mm256_packus_epi32(narrow(x.a), narrow(x.b));  // interleaves the 128-bit halves
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
INLINE void store(int8_t* p, F x) {  // whole numbers that fit
    __m256i shorts = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // interleaves halves
    shorts = _mm256_permute4x64_epi64(shorts, 0xd8);
    _mm_storeu_si128((__m128i*)p,
                     _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
}
INLINE void store(int16_t* p, F x) {  // whole numbers that fit
    __m256i shorts = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // interleaves halves
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(shorts, 0xd8));
}
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE float sum(F x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float max_lane(F x) {
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
INLINE F round_to_int(F x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE __m256 power2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE F scale2(F x, F n) { return {_mm256_mul_ps(x.a, power2(n.a)), _mm256_mul_ps(x.b, power2(n.b))}; }
INLINE __m256 keep8(__m256 x, int from, int to, float other) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i drop = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane),
                                   _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(to - 1)));
    return _mm256_blendv_ps(x, _mm256_set1_ps(other), _mm256_castsi256_ps(drop));
}
// Lanes [from, to) of x, the others become `other`.
INLINE F keep(F x, int from, int to, float other) {
    return {keep8(x.a, from, to, other), keep8(x.b, from - 8, to - 8, other)};
}

INLINE W word(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE W splat(const void* p) {
    int32_t w;
    memcpy(&w, p, 4);
    return set_int(w);
}
INLINE W both(W w, __m256i mask) { return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)}; }
INLINE W low_halves(W w) { return both(w, _mm256_set1_epi32(0xffff)); }
INLINE W high_halves(W w) { return both(w, _mm256_set1_epi32(0xffff0000)); }
INLINE W low_nibbles(W w) { return both(w, _mm256_set1_epi8(15)); }
INLINE W keep_bits(W w, int byte) { return both(w, _mm256_set1_epi8(char(byte))); }
INLINE W either(W x, W y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
// Every lane shifted left by N bits, or right by -N.
template <int N>
INLINE W shift(W w) {
    if constexpr (N < 0)
        return {_mm256_srli_epi32(w.a, -N), _mm256_srli_epi32(w.b, -N)};
    else
        return {_mm256_slli_epi32(w.a, N), _mm256_slli_epi32(w.b, N)};
}
INLINE W keep_lanes(W w, uint32_t mask) { return both(w, _mm256_set1_epi32(int(mask))); }
// Every lane shifted right by N bits, its sign coming along.
template <int N>
INLINE W shift_signed(W w) {
    return {_mm256_srai_epi32(w.a, N), _mm256_srai_epi32(w.b, N)};
}
INLINE void store_word(void* p, W w) {
    _mm256_storeu_si256((__m256i*)p, w.a);
    _mm256_storeu_si256((__m256i*)p + 1, w.b);
}
INLINE W high_nibbles(W w) { return low_nibbles({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
// Byte i of the table for each byte i < 16 of w.
typedef __m256i Table;
INLINE Table table(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
INLINE W look_up(Table t, W w) { return {_mm256_shuffle_epi8(t, w.a), _mm256_shuffle_epi8(t, w.b)}; }
INLINE F as_float(W w) { return {_mm256_castsi256_ps(w.a), _mm256_castsi256_ps(w.b)}; }
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE F half_to_float(const void* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
// Sixteen pairs of 8-bit floats (float8_to_float), divided by FLOAT8_UNIT: the first ones, and the second ones. Bits are
// moved to where float32 has them, which takes fewer steps than float16, whose conversion is slow on some machines.
constexpr float FLOAT8_UNIT = 0x1p120f, FLOAT8_X = 0x1p60f;
INLINE int float8_place(int channel) { return channel % 8 * 2 + channel / 8; }  // of its pair among the sixteen
INLINE F widen_halves(__m256i h) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(h, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(h, _mm256_set1_epi32(0xffff0000)))};
}
INLINE void widen_float8(const uint16_t* p, F& first, F& second) {
    __m256i pairs = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi16((short)0x87f0);
    second = widen_halves(_mm256_and_si256(_mm256_srai_epi16(pairs, 4), mask));
    first = widen_halves(_mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(pairs, 8), 4), mask));
}

INLINE F dot_bf16(F c, W w, W a) {
    F w_low = {_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
    F a_low = {_mm256_castsi256_ps(_mm256_slli_epi32(a.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.b, 16))};
    const __m256i high = _mm256_set1_epi32(0xffff0000);
    return fma(as_float(both(w, high)), as_float(both(a, high)), fma(w_low, a_low, c));
}

// The steps of a dot product of bytes, where no instruction does all of it (byte_dot.h).
#define BLADE_DOT_BY_PAIRS
INLINE W even_bytes(W w) { return both(w, _mm256_set1_epi16(0xff)); }
INLINE W odd_bytes(W w) { return {_mm256_srli_epi16(w.a, 8), _mm256_srli_epi16(w.b, 8)}; }
// Inline assembly: GCC 12 would reassociate these sums into trees, and spill all their terms.
INLINE __m256i add_madd(__m256i c, __m256i w, __m256i a) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(products) : "x"(w), "x"(a));
    return c;
}
INLINE __m256i add_maddubs(__m256i c, __m256i w, __m256i a) {
    __m256i products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(c), "=&x"(products) : "x"(w), "x"(a));
    return c;
}
// c + sums of two products of int16, in int32.
INLINE I add_dot_shorts(I c, W w, W a) { return {add_madd(c.a, w.a, a.a), add_madd(c.b, w.b, a.b)}; }
// c + sums of two products of w's unsigned bytes with a's signed ones, in int16: the caller sees to it that they fit.
INLINE W add_dot_bytes(W c, W w, W a) { return {add_maddubs(c.a, w.a, a.a), add_maddubs(c.b, w.b, a.b)}; }
INLINE W dot_bytes(W w, W a) { return {_mm256_maddubs_epi16(w.a, a.a), _mm256_maddubs_epi16(w.b, a.b)}; }
INLINE W one_shorts() { return {_mm256_set1_epi16(1), _mm256_set1_epi16(1)}; }
}  // namespace vec
