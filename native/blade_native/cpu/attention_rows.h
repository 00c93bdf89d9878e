// Rows of activations for a dot product with a cache: queries, and the weights of values. A cache of floats takes them
// as they are; one in int8 takes integers of 16 bits, so that sums are exact and cost two multiplications per word.
#pragma once
#include "dot.h"
#include "hadamard.h"

namespace attention {
// What a row's numbers are multiples of, and where its sums begin.
template <class E>
struct Row {
    float factor = 1;
    INLINE vec::F start(const Row&) { return vec::zero(); }
    INLINE vec::F total(vec::F sum, const Row& row) { return vec::mul(sum, vec::set(row.factor)); }
};
template <>
struct Row<Code> {
    float factor = 0;
    int32_t excess = 0;  // what ZERO in every code adds to a sum
    INLINE vec::I start(const Row& row) { return vec::set_int(-row.excess); }
    INLINE vec::F total(vec::I sum, const Row& row) { return vec::mul(vec::to_float(sum), vec::set(row.factor)); }
};

// x [n] -> numbers; n is a multiple of 16, at most 256. The factor is NaN where x is not finite.
INLINE Row<Code> make_row(const float* x, int n, int16_t* numbers) {
    constexpr float MOST = 32767;
    vec::F most = vec::zero(), nothing = vec::zero(), sum = vec::zero();
    for (int i = 0; i < n; i += vec::LANES) {
        vec::F v = vec::load(x + i);
        most = vec::max(most, vec::max(v, vec::sub(vec::zero(), v)));
        nothing = vec::fma(v, vec::zero(), nothing);  // NaN for infinity and NaN
    }
    float bound = vec::max_lane(most), no_number = vec::sum(nothing);
    bool usable = bound >= 0x1p-100f && no_number == 0;  // so that the inverse is finite
    vec::F inverse = vec::set(usable ? MOST / bound : 0);
    for (int i = 0; i < n; i += vec::LANES) {
        vec::F q = usable ? vec::round_to_int(vec::mul(vec::load(x + i), inverse)) : vec::zero();
        vec::store(numbers + i, q);
        sum = vec::add(sum, q);
    }
    return {usable ? bound / MOST : no_number, Code::ZERO * int32_t(vec::sum(sum))};
}
}  // namespace attention
