// Plain weights become integers in groups, once, when a model is loaded: the algorithms of plugins/blade_rtn, which says
// why they are what they are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"
#include "parallel.h"
#include "vec.h"

namespace {
constexpr int MAX_GROUP = 128;
constexpr long ROWS = vec::LANES;  // of an item: their groups fill whole vectors
constexpr float LEVELS = 15;
constexpr float SHARES[] = {1.0f, 0.85f};  // of a group's own range: where the search starts
constexpr int ROUNDS = 3;                  // of rounding and fitting from each start

// One number of each of sixteen groups, or what is known of these.
struct alignas(64) Lanes {
    float of[vec::LANES];
};

template <class E>
void widen(const E* x, int group, float* out) {
    for (int i = 0; i < group; i++) out[i] = vec::to_float(x[i]);
}

// Bytes of round(x * inverse + shift), kept within low..high.
void put_rounded(const float* x, int group, float inverse, float shift, float low, float high, uint8_t* q) {
    for (int i = 0; i < group; i += vec::LANES) {
        vec::F rounded = vec::round_to_int(vec::fma(vec::load(x + i), vec::set(inverse), vec::set(shift)));
        vec::store((int8_t*)q + i, vec::min(vec::max(rounded, vec::set(low)), vec::set(high)));
    }
}

float inverse_of(float scale) { return scale > 0 ? 1 / scale : 0; }

// The largest number of a group decides its scale.
template <class E>
void round_to_8(const E* x, int group, uint8_t* q, uint16_t* scale) {
    float numbers[MAX_GROUP], most = 0;
    widen(x, group, numbers);
    for (int i = 0; i < group; i++) most = std::max(most, fabsf(numbers[i]));
    *scale = vec::to_half(most / 127);
    put_rounded(numbers, group, inverse_of(vec::half_to_float(*scale)), 0, -128, 127, q);
    for (int i = 0; i < group; i++) q[i] ^= 128;
}

// Sixteen groups whose numbers are x [group][16], and what does not depend on how they are rounded.
struct Groups {
    const Lanes* x;
    int size;
    Lanes low, high, total;

    Groups(const Lanes* numbers, int group) : x(numbers), size(group) {
        vec::F l = vec::zero(), h = vec::load(x[0].of), sum = vec::zero();
        for (int i = 0; i < size; i++) {
            vec::F v = vec::load(x[i].of);
            l = vec::min(l, v), h = vec::max(h, v), sum = vec::add(sum, v);
        }
        vec::store(low.of, l), vec::store(high.of, h), vec::store(total.of, sum);
    }
};

// Sums over a group that is rounded to q.
struct Sums {
    Lanes xq, q, qq;
};

Sums rounded_sums(const Groups& groups, const Lanes& scale, const Lanes& minimum) {
    Lanes inverse, shift;
    for (int i = 0; i < vec::LANES; i++) {
        inverse.of[i] = inverse_of(scale.of[i]);
        shift.of[i] = -minimum.of[i] * inverse.of[i];
    }
    vec::F factor = vec::load(inverse.of), start = vec::load(shift.of), most = vec::set(LEVELS);
    vec::F xq = vec::zero(), sum = vec::zero(), qq = vec::zero();
    for (int i = 0; i < groups.size; i++) {
        vec::F x = vec::load(groups.x[i].of), q = vec::round_to_int(vec::fma(x, factor, start));
        q = vec::min(vec::max(q, vec::zero()), most);
        xq = vec::fma(x, q, xq), sum = vec::add(sum, q), qq = vec::fma(q, q, qq);
    }
    Sums sums;
    vec::store(sums.xq.of, xq), vec::store(sums.q.of, sum), vec::store(sums.qq.of, qq);
    return sums;
}

// Scale and minimum become those of least squared error for how they round, where these exist; minima are at most 0.
// Gives that error less the sum of x^2.
Lanes least_squares(const Groups& groups, Lanes& scale, Lanes& minimum) {
    Sums sums = rounded_sums(groups, scale, minimum);
    Lanes error;
    float n = float(groups.size);
    for (int i = 0; i < vec::LANES; i++) {
        float xq = sums.xq.of[i], q = sums.q.of[i], qq = sums.qq.of[i], total = groups.total.of[i];
        float determinant = n * qq - q * q, m = (qq * total - q * xq) / determinant;
        float s = m > 0 ? xq / qq : (n * xq - total * q) / determinant;
        bool solved = (determinant > 0) & (s > 0);
        s = scale.of[i] = solved ? s : scale.of[i];
        m = minimum.of[i] = solved ? std::min(m, 0.0f) : minimum.of[i];
        error.of[i] = s * (s * qq - 2 * xq + 2 * m * q) + m * (n * m - 2 * total);
    }
    return error;
}

// The scale and minimum of each group that have the least error of all candidates.
void fit(const Groups& groups, Lanes& best_scale, Lanes& best_minimum) {
    Lanes least;
    std::fill(least.of, least.of + vec::LANES, INFINITY);
    best_scale = best_minimum = least;
    for (float share : SHARES) {
        Lanes scale, minimum;
        for (int i = 0; i < vec::LANES; i++) {
            float range = groups.high.of[i] - groups.low.of[i];
            scale.of[i] = range * (share / LEVELS);
            minimum.of[i] = std::min(groups.low.of[i] + range * ((1 - share) / 2), 0.0f);
        }
        for (int round = 0; round < ROUNDS; round++) {
            Lanes error = least_squares(groups, scale, minimum);
            for (int i = 0; i < vec::LANES; i++) {
                bool better = error.of[i] < least.of[i];
                least.of[i] = better ? error.of[i] : least.of[i];
                best_scale.of[i] = better ? scale.of[i] : best_scale.of[i];
                best_minimum.of[i] = better ? minimum.of[i] : best_minimum.of[i];
            }
        }
    }
}

// Codes and what they count, so that their products come close to the values of one row, all of one sign, and replace
// them.
void encode(float* values, long count, uint8_t* codes, uint16_t* block) {
    auto [low, high] = std::minmax_element(values, values + count);
    *block = vec::to_half((*low < 0 ? *low : *high) / 255);
    float unit = vec::half_to_float(*block);
    for (long i = 0; i < count; i++) {
        float code = std::nearbyintf(values[i] / unit);  // NaN where both are 0
        codes[i] = uint8_t(code > 0 ? std::min(code, 255.0f) : 0);
        values[i] = codes[i] * unit;
    }
}

// Rows [from, to): x [to - from, k] are theirs.
template <class E>
void round_to_4(const Rounding& r, const E* x, long from, long to) {
    const long per_row = r.k / r.group, count = (to - from) * per_row;
    const long padded = (count + vec::LANES - 1) / vec::LANES * vec::LANES;
    std::vector<float> scales(padded), minima(padded);
    for (long g = 0; g < padded; g += vec::LANES) {
        Lanes numbers[MAX_GROUP], scale, minimum;
        std::fill(numbers, numbers + r.group, Lanes{});
        for (long lane = 0; lane < std::min<long>(vec::LANES, count - g); lane++)
            for (int i = 0; i < r.group; i++) numbers[i].of[lane] = vec::to_float(x[(g + lane) * r.group + i]);
        fit(Groups(numbers, r.group), scale, minimum);
        vec::store(&scales[g], vec::load(scale.of)), vec::store(&minima[g], vec::load(minimum.of));
    }
    for (long row = from; row < to; row++) {
        float *scale = &scales[(row - from) * per_row], *minimum = &minima[(row - from) * per_row];
        encode(scale, per_row, (uint8_t*)r.scales + row * per_row, r.block_scales + row);
        encode(minimum, per_row, r.minima + row * per_row, r.block_minima + row);
        for (long g = 0; g < per_row; g++, x += r.group) {
            float numbers[MAX_GROUP], inverse = inverse_of(scale[g]);
            widen(x, r.group, numbers);
            put_rounded(numbers, r.group, inverse, -minimum[g] * inverse, 0, LEVELS, r.q + row * r.k + g * r.group);
        }
    }
}

template <class E>
void round_rows(const Rounding& r, int threads) {
    parallel_for(threads, (r.n + ROWS - 1) / ROWS, 1, [&](long item, int) {
        long from = item * ROWS, to = std::min(from + ROWS, long(r.n)), groups = r.k / r.group;
        const E* x = (const E*)r.weight + from * r.k;
        if (r.bits == 4) return round_to_4(r, x, from, to);
        for (long g = from * groups; g < to * groups; g++, x += r.group)
            round_to_8(x, r.group, r.q + g * r.group, (uint16_t*)r.scales + g);
    });
}
}  // namespace

EXPORT int blade_round(const Rounding* rounding, int threads) {
    if (rounding->dtype == FLOAT32)
        round_rows<float>(*rounding, threads);
    else if (rounding->dtype == BFLOAT16)
        round_rows<bf16>(*rounding, threads);
    else
        round_rows<half>(*rounding, threads);
    return OK;
}
