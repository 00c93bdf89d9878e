// AVX-512 F/BW/VL/DQ; bf16 and byte dot products in hardware where the level has AVX512_BF16 and AVX512_VNNI.
#pragma once
#include <immintrin.h>

namespace vec {
typedef __m512 F;
typedef __m512i I;
typedef __m512i W;

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F set(float x) { return _mm512_set1_ps(x); }
INLINE I set_int(int x) { return _mm512_set1_epi32(x); }
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE F load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE F load(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE F load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE void stream(float* p, F x) { _mm512_stream_ps(p, x); }  // past the caches; p is aligned to 64 bytes
INLINE void store(bf16* p, F x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    I u = _mm512_castps_si512(x);
    I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    I rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    I nan = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
INLINE void store(int8_t* p, F x) {  // whole numbers that fit
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
INLINE void store(int16_t* p, F x) {  // whole numbers that fit
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
INLINE float max_lane(F x) { return _mm512_reduce_max_ps(x); }
INLINE F round_to_int(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }  // x * 2^n, n whole
// Lanes [from, to) of x, the others become `other`.
INLINE F keep(F x, int from, int to, float other) {
    uint32_t below_to = to >= LANES ? 0xffff : to <= 0 ? 0 : (1u << to) - 1;
    uint32_t below_from = from >= LANES ? 0xffff : from <= 0 ? 0 : (1u << from) - 1;
    return _mm512_mask_mov_ps(_mm512_set1_ps(other), (__mmask16)(below_to & ~below_from), x);
}

INLINE W word(const void* p) { return _mm512_loadu_si512(p); }
INLINE W splat(const void* p) {
    int32_t w;
    memcpy(&w, p, 4);
    return _mm512_set1_epi32(w);
}
INLINE W low_halves(W w) { return _mm512_and_si512(w, _mm512_set1_epi32(0xffff)); }
INLINE W high_halves(W w) { return _mm512_and_si512(w, _mm512_set1_epi32(0xffff0000)); }
INLINE W low_nibbles(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
INLINE W keep_bits(W w, int byte) { return _mm512_and_si512(w, _mm512_set1_epi8(char(byte))); }
INLINE W either(W x, W y) { return _mm512_or_si512(x, y); }
// Every lane shifted left by N bits, or right by -N.
template <int N>
INLINE W shift(W w) {
    if constexpr (N < 0)
        return _mm512_srli_epi32(w, -N);
    else
        return _mm512_slli_epi32(w, N);
}
INLINE W keep_lanes(W w, uint32_t mask) { return _mm512_and_si512(w, _mm512_set1_epi32(int(mask))); }
// Every lane shifted right by N bits, its sign coming along.
template <int N>
INLINE W shift_signed(W w) {
    return _mm512_srai_epi32(w, N);
}
INLINE void store_word(void* p, W w) { _mm512_storeu_si512(p, w); }
INLINE W high_nibbles(W w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
// Byte i of the table for each byte i < 16 of w.
typedef __m512i Table;
INLINE Table table(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE W look_up(Table t, W w) { return _mm512_shuffle_epi8(t, w); }
INLINE F as_float(W w) { return _mm512_castsi512_ps(w); }
INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
INLINE F half_to_float(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// Sixteen pairs of 8-bit floats (float8_to_float), divided by FLOAT8_UNIT: the first ones, and the second ones.
constexpr float FLOAT8_UNIT = 0x1p8f, FLOAT8_X = 1;
INLINE int float8_place(int channel) { return channel; }  // of its pair among the sixteen
INLINE void widen_float8(const uint16_t* p, F& first, F& second) {
    __m256i pairs = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi16((short)0xbf80);
    second = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(pairs, 1), mask));
    first = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(pairs, 8), 1), mask));
}

INLINE F dot_bf16(F c, W w, W a) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(c, (__m512bh)w, (__m512bh)a);
#else
    const W high = _mm512_set1_epi32(0xffff0000);
    c = fma(as_float(_mm512_slli_epi32(w, 16)), as_float(_mm512_slli_epi32(a, 16)), c);
    return fma(as_float(_mm512_and_si512(w, high)), as_float(_mm512_and_si512(a, high)), c);
#endif
}

// Sixteen bytes at p, each in a lane of its own, `places` saying where: 0 for a byte of the lane, 128 for zero.
INLINE W spread(const void* p, int places) {
    __m128i order = _mm_add_epi32(_mm_set1_epi32(places), _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    return _mm512_shuffle_epi8(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), _mm512_broadcast_i32x4(order));
}
INLINE W spread_bytes(const void* p) { return spread(p, 0); }
INLINE W spread_shorts(const void* p) { return spread(p, int(0x80008000)); }
INLINE W one_shorts() { return _mm512_set1_epi16(1); }
// The low nibbles of sixteen bytes, or the high ones.
INLINE F load_nibbles(const void* p, bool high) {
    W w = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm512_cvtepi32_ps(high ? _mm512_srli_epi32(w, 4) : _mm512_and_si512(w, _mm512_set1_epi32(15)));
}
INLINE W mul_shorts(W x, W y) { return _mm512_mullo_epi16(x, y); }  // the low halves of the products
INLINE W add_bytes(W x, W y) { return _mm512_add_epi8(x, y); }
INLINE W even_bytes(W w) { return _mm512_and_si512(w, _mm512_set1_epi16(0xff)); }
INLINE W odd_bytes(W w) { return _mm512_srli_epi16(w, 8); }
#ifdef __AVX512VNNI__
// c + sum over the four bytes of w (unsigned) times a (signed); exact.
INLINE I dot_bytes(I c, W w, W a) {
#ifdef BLADE_NO_INLINE_ASM
    return _mm512_dpbusd_epi32(c, w, a);
#else
    // Inline assembly: GCC 12 copies registers around its intrinsic, which halves the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w), "v"(a));
    return c;
#endif
}
// c + sums of two products of int16, in int32.
INLINE I add_dot_shorts(I c, W w, W a) {
#ifdef BLADE_NO_INLINE_ASM
    return _mm512_dpwssd_epi32(c, w, a);
#else
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(w), "v"(a));
    return c;
#endif
}
#else
// The steps of a dot product of bytes, where no instruction does all of it (byte_dot.h).
#define BLADE_DOT_BY_PAIRS
#ifdef BLADE_NO_INLINE_ASM
INLINE I add_dot_shorts(I c, W w, W a) { return _mm512_add_epi32(c, _mm512_madd_epi16(w, a)); }
INLINE W add_dot_bytes(W c, W w, W a) { return _mm512_add_epi16(c, _mm512_maddubs_epi16(w, a)); }
#else
// Inline assembly: GCC 12 would reassociate these sums into trees, and spill all their terms.
// c + sums of two products of int16, in int32.
INLINE I add_dot_shorts(I c, W w, W a) {
    W products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(c), "=&v"(products) : "v"(w), "v"(a));
    return c;
}
// c + sums of two products of w's unsigned bytes with a's signed ones, in int16: the caller sees to it that they fit.
INLINE W add_dot_bytes(W c, W w, W a) {
    W products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+v"(c), "=&v"(products) : "v"(w), "v"(a));
    return c;
}
#endif
INLINE W dot_bytes(W w, W a) { return _mm512_maddubs_epi16(w, a); }
#endif
}  // namespace vec
