// AVX-512 F/BW/VL/DQ; bf16 and byte dot products in hardware where the level has AVX512_BF16 and AVX512_VNNI.
#pragma once
#include <immintrin.h>

namespace vec {
typedef __m512 F;
typedef __m512i I;
typedef __m512i W;
constexpr int MAX_ROWS = 12;  // 24 accumulators of a 32-channel panel, 2 weights and 1 activation fit 32 registers

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F set(float x) { return _mm512_set1_ps(x); }
INLINE I set_int(int x) { return _mm512_set1_epi32(x); }
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE F load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
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
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
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
INLINE W low_nibbles(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
INLINE W high_nibbles(W w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
INLINE F as_float(W w) { return _mm512_castsi512_ps(w); }
INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
INLINE F half_to_float(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

INLINE F dot_bf16(F c, W w, W a) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(c, (__m512bh)w, (__m512bh)a);
#else
    const W high = _mm512_set1_epi32(0xffff0000);
    c = fma(as_float(_mm512_slli_epi32(w, 16)), as_float(_mm512_slli_epi32(a, 16)), c);
    return fma(as_float(_mm512_and_si512(w, high)), as_float(_mm512_and_si512(a, high)), c);
#endif
}
// c + sum over the four bytes of w (unsigned) times a (signed); exact.
INLINE I dot_bytes(I c, W w, W a) {
#ifdef __AVX512VNNI__
    // Inline assembly: GCC 12 copies registers around its intrinsic, which halves the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w), "v"(a));
    return c;
#else
    const W low = _mm512_set1_epi16(0xff);
    W even = _mm512_madd_epi16(_mm512_and_si512(w, low), _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
    W odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8));
    return _mm512_add_epi32(c, _mm512_add_epi32(even, odd));
#endif
}
}  // namespace vec
