// AVX-512 for machines without it, to test vec_avx512.h: included before a source, it makes SIMDe (simd-everywhere,
// Debian's libsimde-dev) answer for the intrinsics, and the functions below for those that SIMDe 0.7.4 lacks or does
// otherwise than Intel's manual (SDM, volume 2) has it. Inline assembly, which cannot be emulated, is left out.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// What the compiler would define for the level; -DBLADE_EMULATE_VNNI and -DBLADE_EMULATE_BF16 ask for those that have them.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#ifdef BLADE_EMULATE_VNNI
#define __AVX512VNNI__ 1
#endif
#ifdef BLADE_EMULATE_BF16
#define __AVX512BF16__ 1
#endif
#define BLADE_NO_INLINE_ASM

// GCC's own types of these names hold the same bits, and are what the sources cast between.
#undef __m512
#undef __m512i
#define __m512 simde__m512
#define __m512i simde__m512i

namespace emulated {
union Vector {
    __m512 f;
    __m512i i;
    __m256 halves[2];
    __m256i words[2];
    float lanes[16];
    uint32_t bits[16];
    Vector(__m512 x) : f(x) {}
    Vector(__m512i x) : i(x) {}
    Vector(__m256 a, __m256 b) : halves{a, b} {}
    Vector(__m256i a, __m256i b) : words{a, b} {}
};

inline __m512 from_int(__m512i x) {
    Vector v(x);
    return Vector(_mm256_cvtepi32_ps(v.words[0]), _mm256_cvtepi32_ps(v.words[1])).f;
}
inline __m512i to_int(__m512 x) {
    Vector v(x);
    return Vector(_mm256_cvtps_epi32(v.halves[0]), _mm256_cvtps_epi32(v.halves[1])).i;
}
inline __m512i widen_shorts(__m256i x) {
    return Vector(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))).i;
}
inline __m512i widen_bytes(__m128i x) {
    return Vector(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))).i;
}
inline __m512i widen_signed_bytes(__m128i x) {
    return Vector(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))).i;
}
inline __m512 widen_halves(__m256i x) {
    return Vector(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))).f;
}
inline __m256i truncate(__m512i x) {  // the low halves of words
    Vector v(x);
    uint16_t shorts[16];
    for (int i = 0; i < 16; i++) shorts[i] = uint16_t(v.bits[i]);
    return _mm256_loadu_si256((const __m256i*)shorts);
}
inline __m512i add_pairs(__m512i a, __m512i b) {
    Vector x(a), y(b);
    return Vector(_mm256_madd_epi16(x.words[0], y.words[0]), _mm256_madd_epi16(x.words[1], y.words[1])).i;
}
inline __m512i shift_signed(__m512i x, unsigned count) {
    Vector v(x);
    return Vector(_mm256_srai_epi32(v.words[0], count), _mm256_srai_epi32(v.words[1], count)).i;
}
inline void stream(void* p, __m512 x) {
    Vector v(x);
    _mm256_stream_ps((float*)p, v.halves[0]);
    _mm256_stream_ps((float*)p + 8, v.halves[1]);
}

// A reduction folds halves onto each other.
template <class Fold>
inline float reduce(__m512 x, Fold fold) {
    Vector v(x);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) v.lanes[i] = fold(v.lanes[i], v.lanes[i + width]);
    return v.lanes[0];
}
inline float sum(__m512 x) {
    return reduce(x, [](float a, float b) { return a + b; });
}
inline float most(__m512 x) {
    return reduce(x, [](float a, float b) { return a > b ? a : b; });
}

// x * 2^floor(n), which SIMDe has flush subnormals.
inline __m512 scale(__m512 x, __m512 n) {
    Vector v(x), by(n);
    for (int i = 0; i < 16; i++) v.lanes[i] = std::scalbln(v.lanes[i], long(std::floor(by.lanes[i])));
    return v.f;
}

inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t flush(uint32_t bits) { return bits & 0x7f800000 ? bits : bits & 0x80000000; }  // a subnormal to zero
inline float flush(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return as_float(flush(bits));
}

// VDPBF16PS: the odd products are added before the even ones; subnormals are zeros, before and after.
inline __m512 dot_bf16(__m512 c, __m512i a, __m512i b) {
    Vector sums(c), x(a), y(b);
    for (int i = 0; i < 16; i++) {
        auto product = [&](float sum, uint32_t p, uint32_t q) {
            return flush(std::fma(as_float(flush(p)), as_float(flush(q)), flush(sum)));
        };
        float odd = product(sums.lanes[i], x.bits[i] & 0xffff0000, y.bits[i] & 0xffff0000);
        sums.lanes[i] = product(odd, x.bits[i] << 16, y.bits[i] << 16);
    }
    return sums.f;
}

// VCVTNEPS2BF16: to nearest, ties to even; subnormals become zeros.
inline __m256i narrow(__m512 x) {
    Vector v(x);
    uint16_t shorts[16];
    for (int i = 0; i < 16; i++) {
        uint32_t u = flush(v.bits[i]);
        bool is_nan = (u & 0x7fffffff) > 0x7f800000;
        shorts[i] = uint16_t(is_nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    return _mm256_loadu_si256((const __m256i*)shorts);
}
}  // namespace emulated

#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi32_epi16
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_scalef_ps
#undef _mm512_dpbf16_ps
#undef _mm512_madd_epi16
#undef _mm512_srai_epi32
#define _mm512_cvtepi32_ps(x) emulated::from_int(x)
#define _mm512_cvtps_epi32(x) emulated::to_int(x)
#define _mm512_cvtepu16_epi32(x) emulated::widen_shorts(x)
#define _mm512_cvtepu8_epi32(x) emulated::widen_bytes(x)
#define _mm512_cvtepi8_epi32(x) emulated::widen_signed_bytes(x)
#define _mm512_cvtph_ps(x) emulated::widen_halves(x)
#define _mm512_cvtepi32_epi16(x) emulated::truncate(x)
#define _mm512_stream_ps(p, x) emulated::stream(p, x)
#define _mm512_reduce_add_ps(x) emulated::sum(x)
#define _mm512_reduce_max_ps(x) emulated::most(x)
#define _mm512_scalef_ps(x, n) emulated::scale(x, n)
#define _mm512_dpbf16_ps(c, a, b) emulated::dot_bf16(c, (__m512i)(a), (__m512i)(b))
#define _mm512_cvtneps_pbh(x) emulated::narrow(x)
#define _mm512_madd_epi16(a, b) emulated::add_pairs(a, b)
#define _mm512_srai_epi32(x, count) emulated::shift_signed(x, count)
