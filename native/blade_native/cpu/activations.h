// Rows of x as the tiles of a linear want them: words of R rows beside each other, or int8 with a scale per group. AMX has
// a row's words beside each other.
#pragma once
#include <algorithm>

#include "linear_tile.h"

constexpr int MOST_ROWS = AMX ? AMX_ROWS : STREAM_ROWS;  // of a tile of integers
constexpr float LEAST_BOUND = 0x1p-120f;  // of a group of a row: 127 divided by less need not be finite

// float or bf16 rows [R][k], times a factor -> floats [padded][R], zeros from k on.
template <class X>
void pack_floats(const X* x, long k, int rows, float factor, float* out, long padded) {
    std::fill(out + k * rows, out + padded * rows, 0.0f);
    for (int r = 0; r < rows; r++)
        vec::for_lanes(k, [&](long i, int lanes) {
            float values[vec::LANES];
            vec::store(values, vec::mul(vec::load_some(x + r * k + i, lanes), vec::set(factor)));
            for (int j = 0; j < lanes; j++) out[(i + j) * rows + r] = values[j];
        });
}

// bf16 rows [R][k] -> words of two, [k / 2][R]; or with more than one of a row side by side [k / 2 / SIDE][R][SIDE], what is
// left at the end as [R][rest]. Of these words those of [first, last), both of them multiples of SIDE or the end.
template <int SIDE>
INLINE void pack_words(const bf16* x, long k, int rows, long first, long last, uint32_t* out) {
    for (long u = first; u < last; u += SIDE) {
        const long num = std::min<long>(SIDE, last - u);
        for (int r = 0; r < rows; r++) memcpy(out + u * rows + r * num, x + r * k + 2 * u, 4 * num);
    }
}

// The largest magnitude of some numbers.
template <class X>
INLINE float bound_of(const X* x, long num) {
    vec::F most = vec::zero(), least = vec::zero();
    for (long i = 0; i < num; i += vec::LANES) {
        vec::F v = vec::load(x + i);
        most = vec::max(most, v);
        least = vec::min(least, v);
    }
    return vec::max_lane(vec::max(most, vec::sub(vec::zero(), least)));
}

// How a unit's words of int8 lie: [steps][R][WORDS], or for AMX [R][steps].
template <int W>
struct BySteps {
    static constexpr int WORDS = W;
    static long row(int) { return WORDS; }
    static long step(int rows) { return rows * WORDS; }
    INLINE void put(const uint32_t (&words)[vec::LANES / 4], uint32_t* out, long step) {
        for (int j = 0; j < vec::LANES / 4; j++) put_step<WORDS>(words[j], out + j * step);
    }
};
struct ByRows {
    static constexpr int WORDS = 1;
    static long row(int steps) { return steps; }
    static long step(int) { return 1; }
    INLINE void put(const uint32_t (&words)[vec::LANES / 4], uint32_t* out, long) { memcpy(out, words, sizeof words); }
};

// Rounds one group of one row to int8, q = x * inverse, and writes the words of its steps `step` apart. Returns the sum of q:
// NaN where x has NaN or infinity, and then the words are any.
template <class Order, class X>
INLINE float quantize_group(const X* x, int group, float inverse, uint32_t* out, long step) {
    vec::F total = vec::zero(), factor = vec::set(inverse);
    for (int i = 0; i < group; i += vec::LANES, out += vec::LANES / 4 * step) {
        vec::F q = vec::round_to_int(vec::mul(vec::load(x + i), factor));
        total = vec::add(total, q);
        uint32_t words[vec::LANES / 4];
        vec::store((int8_t*)words, q);
        Order::put(words, out, step);
    }
    return vec::sum(total);
}

// Rows [R][k] -> units [first, last) of a tile (ActivationGroup), x ~ scale * q with |q| <= 127. Where a row is not finite
// its scale is NaN, and with it all its sums. `order`, that of the weights' columns, may be null.
template <class Order, class X>
void pack_groups(const Layout& layout, const X* x, long k, const int32_t* order, int rows, long first, long last,
                 char* out) {
    const long columns = layout.columns, bytes = rows * activation_bytes(layout.steps, Order::WORDS, layout.groups);
    const int groups = rows <= LATE_ROWS ? layout.groups : 1;  // whose sums are wanted one by one
    const int group = int(columns / groups);
    const long step = Order::step(rows);
    X ordered[MAX_GROUP * MOST_ROWS];
    float inverses[MOST_ROWS];
    out += first * bytes;
    for (long i = first * columns; i < last * columns; i += columns, out += bytes) {
        const X* from = x + i;
        long stride = k;
        if (order) {
            for (int r = 0; r < rows; r++)
                for (int j = 0; j < columns; j++) ordered[r * columns + j] = x[r * k + order[i + j]];
            from = ordered, stride = columns;
        }
        float *scales = (float*)out, *factors = scales + 2 * rows;
        for (int r = 0; r < rows; r++) {
            float bound = bound_of(from + r * stride, columns);
            inverses[r] = bound >= LEAST_BOUND ? 127.0f / bound : 0.0f;
            scales[r] = bound / 127.0f;
        }
        for (int r = 0; r < rows; r++) {
            uint32_t* words = (uint32_t*)factors + layout.groups * rows + r * Order::row(layout.steps);
            float total = 0;  // exact: less than 2^24
            for (int g = 0; g < groups; g++, words += group / 4 * step) {
                float sum = quantize_group<Order>(from + r * stride + g * group, group, inverses[r], words, step);
                factors[g * rows + r] = layout.format.coding == NESTED ? sum : scales[r] * sum;
                total += sum;
            }
            const bool finite = total == total;
            if (!finite) scales[r] = total;
            ((int32_t*)out)[rows + r] = finite ? -layout.zero * int(total) : 0;
        }
    }
}
