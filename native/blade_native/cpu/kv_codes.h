// Rounding of a token's key or value, and where its codes go in a chunk.
#pragma once
#include <algorithm>
#include <cmath>

#include "kv_chunk.h"

// A head as codes, a byte each, with the numbers of its groups.
struct RoundedHead {
    uint8_t codes[MAX_HEAD_DIM];
    float scales[MAX_GROUPS], middles[MAX_GROUPS];
};

struct Range {
    float low, high, nothing;  // `nothing` is 0, or NaN where a number is not finite
};
INLINE Range range_of(const float* x, long n) {
    vec::F low = vec::load(x), high = low, nothing = vec::zero();
    for (long i = 0; i < n; i += vec::LANES) {
        vec::F v = vec::load(x + i);
        low = vec::min(low, v), high = vec::max(high, v);
        nothing = vec::fma(v, vec::zero(), nothing);
    }
    return {-vec::max_lane(vec::sub(vec::zero(), low)), vec::max_lane(high), vec::sum(nothing)};
}

template <class E>
INLINE float as_number(float x) {
    typename E::Number number;
    vec::from_float(x, number);
    return vec::to_float(number);
}

// The scale of integers. Without middles those of 4 bits use all codes: the largest magnitude becomes -ZERO, so that the
// scale has a sign.
template <class E>
INLINE float scale_of(const Range& range, bool affine) {
    if (affine) return (range.high - range.low) / (2 * E::ZERO - 1);
    bool positive = range.high >= -range.low;
    if (E::BITS < 8) return (positive ? range.high : range.low) / -E::ZERO;
    return (positive ? range.high : -range.low) / (E::ZERO - 1);
}

// x [n] as integers; n is a multiple of 16. The scale is NaN where a number is not finite.
template <class E>
INLINE void round_group(const float* x, long n, bool affine, uint8_t* codes, float& scale, float& middle) {
    const Range range = range_of(x, n);
    scale = as_number<E>(scale_of<E>(range, affine) + range.nothing);
    middle = affine ? as_number<E>(range.low + scale * E::ZERO) : 0;
    const bool usable = std::fabs(scale) >= 0x1p-126f;  // so that its inverse is finite
    const vec::F inverse = vec::set(usable ? 1 / scale : 0), away = vec::set(middle);
    for (long i = 0; i < n; i += vec::LANES) {
        int16_t q[vec::LANES] = {};
        if (usable) {
            vec::F c = vec::round_to_int(vec::mul(vec::sub(vec::load(x + i), away), inverse));
            vec::store(q, vec::max(vec::set(-E::ZERO), vec::min(vec::set(E::ZERO - 1), c)));
        }
        for (int j = 0; j < vec::LANES; j++) codes[i + j] = uint8_t(q[j] + E::ZERO);
    }
}

// x [n] as floats of 8 bits, to the nearest, ties to even. Their scale is a power of 2, which costs no precision.
template <class E>
INLINE void round_floats(const float* x, long n, uint8_t* codes, float& scale) {
    constexpr int DROPPED = 16 + E::EXPONENT;  // bits of a float32's mantissa
    Range range = range_of(x, n);
    float most = std::max(range.high, -range.low);
    bool usable = most >= 0x1p-100f && range.nothing == 0;
    int exponent = usable ? std::ilogb(most) - E::TOP : 0;
    scale = usable ? std::ldexp(1.0f, exponent) : range.nothing;
    const float inverse = std::ldexp(1.0f, -exponent), unit = 1 / E::UNIT;
    for (long i = 0; i < n; i++) {
        float scaled = usable ? x[i] * inverse * unit : 0;  // whose exponent has the bits that its code has
        uint32_t u;
        memcpy(&u, &scaled, 4);
        uint32_t magnitude = u & 0x7fffffff;
        magnitude = (magnitude + (1u << (DROPPED - 1)) - 1 + (magnitude >> DROPPED & 1)) >> DROPPED;
        codes[i] = uint8_t(u >> 24 & 0x80 | magnitude);
    }
}

template <class E>
INLINE void round_head(const float* x, const Kept& kept, long head_dim, RoundedHead& head) {
    if constexpr (INTEGER<E>)
        for (long i = 0, g = 0; i < head_dim; i += kept.group, g++)
            round_group<E>(x + i, kept.group, kept.affine, head.codes + i, head.scales[g], head.middles[g]);
    else
        round_floats<E>(x, head_dim, head.codes, head.scales[0]);
}

// The numbers of the chunk's token at `at`.
template <class E>
INLINE void store_numbers(const RoundedHead& head, const Kept& kept, long head_dim, char* chunk, long at) {
    long groups = head_dim / kept.group;
    for (long g = 0; g < groups; g++) {
        vec::from_float(head.scales[g], numbers_of<E>(chunk, head_dim, g)[at]);
        if (kept.affine) vec::from_float(head.middles[g], numbers_of<E>(chunk, head_dim, groups + g)[at]);
    }
}

template <class E>
INLINE void store_key(const float* x, const Kept& kept, long head_dim, char* chunk, long at) {
    constexpr long P = 32 / E::BITS;
    RoundedHead head;
    round_head<E>(x, kept, head_dim, head);
    store_numbers<E>(head, kept, head_dim, chunk, at);
    uint32_t* words = (uint32_t*)chunk + at;
    for (long i = 0; i < head_dim; i += P) {
        uint32_t word = 0;
        for (int j = 0; j < P; j++) word |= uint32_t(head.codes[i + j]) << E::place(j) * E::BITS;
        words[i / P * CHUNK] = word;
    }
}

// Codes of 4 bits share a byte with another token's of the chunk: one thread at a time.
template <class E>
INLINE void store_value(const float* x, const Kept& kept, long head_dim, char* chunk, long at) {
    constexpr long P = 32 / E::BITS;
    RoundedHead head;
    round_head<E>(x, kept, head_dim, head);
    store_numbers<E>(head, kept, head_dim, chunk, at);
    const int bit = E::place(at % P) * E::BITS, shift = bit % 8;
    uint8_t* bytes = (uint8_t*)chunk + at / P * head_dim * 4 + bit / 8;
    for (long i = 0; i < head_dim; i++)
        if constexpr (E::BITS == 8)
            bytes[i * 4] = head.codes[i];
        else
            bytes[i * 4] = uint8_t(bytes[i * 4] & ~(15 << shift) | head.codes[i] << shift);
}
