// What rounding to 4 bits knows of weights: sixteen groups side by side.
#pragma once
#include <cstdint>

#include "vec.h"

constexpr int MAX_ROUNDED_GROUP = 128;
constexpr float LEVELS = 15;

INLINE float inverse_of(float scale) { return scale > 0 ? 1 / scale : 0; }

// One number of each of sixteen groups, or what is known of these.
struct alignas(64) Lanes {
    float of[vec::LANES];
};

// Sixteen groups whose numbers are x [group][16], and what does not depend on how they are rounded.
struct Groups {
    const Lanes* x;
    int size;
    Lanes low, high, total, squares;

    Groups(const Lanes* numbers, int group) : x(numbers), size(group) {
        vec::F l = vec::zero(), h = vec::load(x[0].of), sum = vec::zero(), square = vec::zero();
        for (int i = 0; i < size; i++) {
            vec::F v = vec::load(x[i].of);
            l = vec::min(l, v), h = vec::max(h, v), sum = vec::add(sum, v), square = vec::fma(v, v, square);
        }
        vec::store(low.of, l), vec::store(high.of, h), vec::store(total.of, sum);
        vec::store(squares.of, square);
    }
};
