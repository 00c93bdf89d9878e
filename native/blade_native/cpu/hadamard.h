// A Hadamard transform of a head. Applied to queries and to keys it leaves their products as they are, and spreads the
// few channels in which keys of some models are a hundred times as large as in others, so that a scale per key will do
// (QuaRot, Ashkboos et al. 2024).
#pragma once
#include <cmath>

#include "vec.h"

struct HadamardRows {
    float rows[vec::LANES][vec::LANES];
    constexpr HadamardRows() : rows() {
        for (int i = 0; i < vec::LANES; i++)
            for (int j = 0; j < vec::LANES; j++) rows[i][j] = __builtin_parity(i & j) ? -1.0f : 1.0f;
    }
};
static constexpr HadamardRows HADAMARD;

// x [n] in place, n a multiple of 16: every block of n's largest power of two, times an orthonormal matrix.
INLINE void hadamard(float* x, long n) {
    const long block = n & -n;
    const vec::F factor = vec::set(1 / std::sqrt(float(block)));
    for (long i = 0; i < n; i += vec::LANES) {
        vec::F sum = vec::zero();
        for (int j = 0; j < vec::LANES; j++) sum = vec::fma(vec::set(x[i + j]), vec::load(HADAMARD.rows[j]), sum);
        vec::store(x + i, vec::mul(sum, factor));
    }
    for (long half = vec::LANES; half < block; half *= 2)
        for (long i = 0; i < n; i += vec::LANES) {
            if (i & half) continue;
            vec::F a = vec::load(x + i), b = vec::load(x + i + half);
            vec::store(x + i, vec::add(a, b));
            vec::store(x + i + half, vec::sub(a, b));
        }
}
