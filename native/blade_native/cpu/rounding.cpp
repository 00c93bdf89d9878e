// Plain weights become integers in groups, once, when a model is loaded: the algorithms of plugins/blade_rtn, which says
// why they are what they are.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "api.h"
#include "nesting.h"
#include "parallel.h"
#include "rounding_groups.h"
#include "tile_shape.h"

namespace {
constexpr long ROWS = vec::LANES;  // of an item: their groups fill whole vectors
constexpr float SHARES[] = {1.0f, 0.85f};  // of a group's own range: where the search starts
constexpr int ROUNDS = 3;                  // of rounding and fitting from each start
constexpr double NESTED_ERROR = 1.5;       // times the least squared error of the groups

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

// The largest number of a group decides its scale, which is NaN where one of them is not finite.
template <class E>
void round_symmetric(const E* x, int bits, int group, uint8_t* q, uint16_t* scale) {
    const int half = 1 << (bits - 1);
    float numbers[MAX_ROUNDED_GROUP], most = 0, nothing = 0;
    widen(x, group, numbers);
    for (int i = 0; i < group; i++) most = std::max(most, fabsf(numbers[i])), nothing += numbers[i] * 0;
    *scale = vec::to_half((most + nothing) / (half - 1));
    put_rounded(numbers, group, inverse_of(vec::half_to_float(*scale)), 0, -half, half - 1, q);
    for (int i = 0; i < group; i++) q[i] += half;
}

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

// The scale and minimum of each group that have the least error of all candidates, and that error less the sum of x^2.
void fit(const Groups& groups, Lanes& best_scale, Lanes& best_minimum, Lanes& least) {
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

// Numbers of the groups g .. g + 15 of a matrix, zeros beyond `count`.
template <class E>
void gather(const E* x, int group, long g, long count, Lanes* out) {
    std::fill(out, out + group, Lanes{});
    for (long lane = 0; lane < std::min<long>(vec::LANES, count - g); lane++)
        for (int i = 0; i < group; i++) out[i].of[lane] = vec::to_float(x[(g + lane) * group + i]);
}

// Some rows that are rounded together.
template <class E>
struct Rows {
    const Rounding& r;
    const E* x;  // [to - from, k], theirs
    long from, to, per_row, count;
    float *scales, *minima, *units;  // of each group, and block, before they are rounded
    double error = 0;                // the sum of squares that scales and minima leave

    // Floats that so many rows have to have room for.
    static long room(long rows, long per_row) { return 3 * (rows * per_row + vec::LANES); }

    Rows(const Rounding& rounding, const E* all, long first, long last, float* room)
        : r(rounding), x(all + first * rounding.k), from(first), to(last), per_row(rounding.k / rounding.group),
          count((last - first) * per_row), scales(room), minima(scales + count + vec::LANES),
          units(minima + count + vec::LANES) {
        for (long g = 0; g < count; g += vec::LANES) {
            Lanes numbers[MAX_ROUNDED_GROUP], scale, minimum, least;
            gather(x, r.group, g, count, numbers);
            Groups groups(numbers, r.group);
            fit(groups, scale, minimum, least);
            vec::store(&scales[g], vec::load(scale.of)), vec::store(&minima[g], vec::load(minimum.of));
            for (long lane = 0; lane < std::min<long>(vec::LANES, count - g); lane++)
                error += least.of[lane] + groups.squares.of[lane];
        }
    }

    // Scales and minima each count a unit of their own.
    void round_freely() {
        const E* at = x;
        for (long row = from; row < to; row++) {
            float *scale = &scales[(row - from) * per_row], *minimum = &minima[(row - from) * per_row];
            encode(scale, per_row, (uint8_t*)r.scales + row * per_row, r.block_scales + row);
            encode(minimum, per_row, r.minima + row * per_row, r.block_minima + row);
            for (long g = 0; g < per_row; g++, at += r.group) {
                float numbers[MAX_ROUNDED_GROUP], inverse = inverse_of(scale[g]);
                widen(at, r.group, numbers);
                put_rounded(numbers, r.group, inverse, -minimum[g] * inverse, 0, LEVELS,
                            r.q + row * r.k + g * r.group);
            }
        }
    }

    // Those of a block count one unit, by codes that nest. Returns the sum of squared errors.
    double nest() {
        const long per_block = r.block / r.group, first = from * r.k / r.block;
        for (long i = 0; i < count / per_block; i++) {
            uint16_t unit = unit_of(&scales[i * per_block], &minima[i * per_block], per_block);
            r.units[first + i] = unit, units[i] = vec::half_to_float(unit);
        }
        double off = 0;
        for (long g = 0; g < count; g += vec::LANES) {
            Lanes numbers[MAX_ROUNDED_GROUP], unit{}, inverse{};
            long lanes = std::min<long>(vec::LANES, count - g);
            gather(x, r.group, g, count, numbers);
            for (long lane = 0; lane < lanes; lane++) {
                unit.of[lane] = units[(g + lane) / per_block];
                inverse.of[lane] = inverse_of(unit.of[lane]);
            }
            NestedGroups nested(numbers, r.group, inverse, &scales[g], &minima[g]);
            for (long lane = 0; lane < lanes; lane++) {
                off += double(nested.error.of[lane]) * unit.of[lane] * unit.of[lane];
                ((uint8_t*)r.scales)[from * per_row + g + lane] = uint8_t(nested.scale.of[lane]);
                r.minima[from * per_row + g + lane] = uint8_t(nested.minimum.of[lane]);
            }
            nested.put(lanes, r.q + from * r.k + g * r.group);
        }
        return off;
    }
};

template <class E>
int round_to_4(Rounding& r, int threads) {
    const long items = (r.n + ROWS - 1) / ROWS, room = Rows<E>::room(ROWS, r.k / r.group);
    Scratch errors((2 * items + 1) * sizeof(double)), rooms(threads * room * sizeof(float));
    double *nested = (double*)errors.data, *least = nested + items;
    if (!nested || !rooms.data) return OUT_OF_MEMORY;
    auto each = [&](auto body) {  // body(item, its rows)
        parallel_for(threads, items, 1, [&](long item, int thread) {
            const long first = item * ROWS, last = std::min<long>(first + ROWS, r.n);
            body(item, Rows<E>(r, (const E*)r.weight, first, last, (float*)rooms.data + thread * room));
        });
    };
    auto sum = [&](const double* parts) { return std::accumulate(parts, parts + items, 0.0); };
    if (NESTS) each([&](long item, Rows<E> rows) { least[item] = rows.error, nested[item] = rows.nest(); });
    r.nested = NESTS && sum(nested) <= NESTED_ERROR * sum(least);
    if (!r.nested) each([](long, Rows<E> rows) { rows.round_freely(); });
    return OK;
}

template <class E>
int round_rows(Rounding& r, int threads) {
    if (r.bits == 4) return round_to_4<E>(r, threads);
    parallel_for(threads, (r.n + ROWS - 1) / ROWS, 1, [&](long item, int) {
        long from = item * ROWS, to = std::min(from + ROWS, long(r.n)), groups = r.k / r.group;
        const E* x = (const E*)r.weight + from * r.k;
        for (long g = from * groups; g < to * groups; g++, x += r.group)
            round_symmetric(x, r.bits, r.group, r.q + g * r.group, (uint16_t*)r.scales + g);
    });
    return OK;
}
}  // namespace

EXPORT int blade_round(Rounding* rounding, int threads) {
    if (rounding->dtype == FLOAT32) return round_rows<float>(*rounding, threads);
    if (rounding->dtype == BFLOAT16) return round_rows<bf16>(*rounding, threads);
    return round_rows<half>(*rounding, threads);
}
