// 4-bit numbers nested in 8-bit ones, w = unit * (c * q - m): the algorithms of plugins/blade_rtn/nested.py.
#pragma once
#include <algorithm>
#include <cmath>

#include "rounding_groups.h"

constexpr float MOST_NESTED_SCALE = 16;  // of 4 bits, and 15 * 16 is less than a byte holds
constexpr int NESTED_SHARES = 9;         // of the least unit, 3 % apart: other ones may suit the scales better
constexpr int NESTED_ROUNDS = 3;         // of rounding and fitting the minimum, for each of two scales

// The unit, a half, by whole multiples of which a block's scales are met best, of those that leave no group without the range
// it wants.
inline uint16_t unit_of(const float* scales, const float* minima, long num) {
    float least = 0;
    for (long g = 0; g < num; g++)
        least = std::max({least, minima[g] / -128, (LEVELS * scales[g] + minima[g]) / 127, scales[g] / MOST_NESTED_SCALE});
    uint16_t best = vec::to_half(least);
    float error = INFINITY;
    for (int i = 0; i < NESTED_SHARES; i++) {
        uint16_t unit = vec::to_half(least * (1 + 0.03f * i));
        float value = vec::half_to_float(unit), inverse = inverse_of(value), off = 0;
        for (long g = 0; g < num; g++) {
            float c = std::clamp(std::nearbyintf(scales[g] * inverse), 1.0f, MOST_NESTED_SCALE);
            off += (c * value - scales[g]) * (c * value - scales[g]);
        }
        if (off < error) error = off, best = unit;
    }
    return best;
}

// Sixteen groups, in units, with the whole scales and minima of least squared error.
struct NestedGroups {
    Lanes x[MAX_ROUNDED_GROUP];
    int size;
    Lanes scale, minimum, error;

    NestedGroups(const Lanes* numbers, int group, const Lanes& inverse, const float* scales, const float* minima)
        : size(group) {
        vec::F factor = vec::load(inverse.of);
        for (int i = 0; i < size; i++) vec::store(x[i].of, vec::mul(vec::load(numbers[i].of), factor));
        std::fill(error.of, error.of + vec::LANES, INFINITY);
        scale = minimum = error;
        for (float add : {0.0f, 1.0f}) {
            Lanes c, m;
            for (int i = 0; i < vec::LANES; i++) {
                c.of[i] = std::clamp(std::floor(scales[i] * inverse.of[i]) + add, 1.0f, MOST_NESTED_SCALE);
                m.of[i] = std::nearbyintf(minima[i] * -inverse.of[i]);
            }
            for (int round = 0; round < NESTED_ROUNDS; round++) try_scale(c, m);
        }
    }

    // Puts the q of the first `lanes` groups one after the other.
    void put(long lanes, uint8_t* q) const {
        for (int i = 0; i < size; i++) {
            Lanes rounded;
            vec::store(rounded.of, round_to(i, scale, minimum));
            for (long lane = 0; lane < lanes; lane++) q[lane * size + i] = uint8_t(rounded.of[lane]);
        }
    }

private:
    vec::F round_to(int i, const Lanes& c, const Lanes& m) const {
        vec::F inverse = vec::div(vec::set(1), vec::load(c.of));
        vec::F q = vec::round_to_int(vec::mul(vec::add(vec::load(x[i].of), vec::load(m.of)), inverse));
        return vec::min(vec::max(q, vec::zero()), vec::set(LEVELS));
    }

    // Keeps what is better than all before; m becomes the best one for how the numbers were rounded.
    void try_scale(const Lanes& c, Lanes& m) {
        for (int i = 0; i < vec::LANES; i++) m.of[i] = std::clamp(m.of[i], std::max(0.0f, LEVELS * c.of[i] - 127), 128.0f);
        vec::F factor = vec::load(c.of), minimum_now = vec::load(m.of), sum = vec::zero(), squares = vec::zero();
        for (int i = 0; i < size; i++) {
            vec::F off = vec::sub(vec::mul(factor, round_to(i, c, m)), vec::load(x[i].of));
            vec::F left = vec::sub(off, minimum_now);
            sum = vec::add(sum, off), squares = vec::fma(left, left, squares);
        }
        Lanes sums, now;
        vec::store(sums.of, sum), vec::store(now.of, squares);
        for (int i = 0; i < vec::LANES; i++) {
            bool better = now.of[i] < error.of[i];
            error.of[i] = better ? now.of[i] : error.of[i];
            scale.of[i] = better ? c.of[i] : scale.of[i];
            minimum.of[i] = better ? m.of[i] : minimum.of[i];
            m.of[i] = std::nearbyintf(sums.of[i] / size);
        }
    }
};
