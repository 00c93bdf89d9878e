// Rows of activations for a dot product with a cache: queries, and the weights of values. A cache of floats takes them
// as they are; one of integers takes integers of 16 bits, so that sums are exact and cost two multiplications per word.
#pragma once
#include "dot.h"

namespace attention {
// Floats of 8 bits are widened to a UNIT-th of what they are. Activations carry some of that, and the sums the rest, so
// that products are far from where numbers lose bits.
constexpr float ACTIVATION_UNIT = 0x1p60f;

// x [n] -> numbers, and the sum of each `group` of them; n is a multiple of 16, at most 256. Returns what the numbers
// are multiples of, NaN where x is not finite.
INLINE float make_shorts(const float* x, int n, int group, int16_t* numbers, int32_t* sums) {
    constexpr float MOST = 32767;
    vec::F most = vec::zero(), nothing = vec::zero();
    for (int i = 0; i < n; i += vec::LANES) {
        vec::F v = vec::load(x + i);
        most = vec::max(most, vec::max(v, vec::sub(vec::zero(), v)));
        nothing = vec::fma(v, vec::zero(), nothing);  // NaN for infinity and NaN
    }
    float bound = vec::max_lane(most), no_number = vec::sum(nothing);
    bool usable = bound >= 0x1p-100f && no_number == 0;  // so that the inverse is finite
    vec::F inverse = vec::set(usable ? MOST / bound : 0);
    for (int i = 0; i < n; i += group) {
        vec::F sum = vec::zero();
        for (int j = i; j < i + group; j += vec::LANES) {
            vec::F q = usable ? vec::round_to_int(vec::mul(vec::load(x + j), inverse)) : vec::zero();
            vec::store(numbers + j, q);
            sum = vec::add(sum, q);
        }
        *sums++ = int32_t(vec::sum(sum));
    }
    return usable ? bound / MOST : no_number;
}

// Where the sum of a row begins whose numbers have this total, and what it comes to.
template <class E>
INLINE typename Word<E>::Sum first_sum(int32_t numbers_sum) {
    if constexpr (INTEGER<E>)
        return vec::set_int(-E::ZERO * numbers_sum);  // what ZERO in every code adds
    else
        return vec::zero();
}
INLINE vec::F total(vec::F sum, float factor) { return vec::mul(sum, vec::set(factor)); }
INLINE vec::F total(vec::I sum, float factor) { return vec::mul(vec::to_float(sum), vec::set(factor)); }
}  // namespace attention
