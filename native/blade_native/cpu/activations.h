// Rows of x as the tiles of a linear want them: words of R rows beside each other, or int8 with a scale per group.
#pragma once
#include <algorithm>

#include "linear_tile.h"

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

// bf16 rows [R][k] -> words of two [k / 2][R].
INLINE void pack_words(const bf16* x, long k, int rows, uint32_t* out) {
    for (int r = 0; r < rows; r++)
        for (long u = 0; u < k / 2; u++) memcpy(out + u * rows + r, x + r * k + 2 * u, 4);
}

// Quantises one group of one row to int8, x ~ scale * q with |q| <= 127, and writes the words of its steps `stride`
// apart. Returns the sum of q.
template <int WORDS, class X>
INLINE int quantize_group(const X* x, int group, float& scale, uint32_t* out, long stride) {
    vec::F most = vec::zero(), least = vec::zero(), total = vec::zero();
    for (int i = 0; i < group; i += vec::LANES) {
        vec::F v = vec::load(x + i);
        most = vec::max(most, v);
        least = vec::max(least, vec::sub(vec::zero(), v));
    }
    float bound = vec::max_lane(vec::max(most, least));
    vec::F inverse = vec::set(bound > 0 ? 127.0f / bound : 0.0f);
    for (int i = 0; i < group; i += vec::LANES, out += vec::LANES / 4 * stride) {
        vec::F q = vec::round_to_int(vec::mul(vec::load(x + i), inverse));
        total = vec::add(total, q);
        uint32_t words[vec::LANES / 4];
        vec::store((int8_t*)words, q);
        for (int j = 0; j < vec::LANES / 4; j++) put_step<WORDS>(words[j], out + j * stride);
    }
    scale = bound / 127.0f;
    return int(vec::sum(total));
}

// Rows [R][k] -> the groups of a tile (ActivationGroup). `zero` is what the weights' q are centred on, or 0; `order`, that
// of the weights' columns, may be null.
template <int WORDS, class X>
void pack_groups(const X* x, long k, const int32_t* order, int rows, int group, int zero, char* out) {
    X ordered[MAX_GROUP];
    for (long i = 0; i < k; i += group, out += rows * activation_bytes(group / 4, WORDS))
        for (int r = 0; r < rows; r++) {
            float *scales = (float*)out, *factors = scales + 2 * rows;
            uint32_t* words = (uint32_t*)out + 3 * rows + r * WORDS;
            const X* from = x + r * k + i;
            if (order) {
                for (int j = 0; j < group; j++) ordered[j] = x[r * k + order[i + j]];
                from = ordered;
            }
            int sum = quantize_group<WORDS>(from, group, scales[r], words, rows * WORDS);
            ((int32_t*)out)[rows + r] = -zero * sum;
            factors[r] = scales[r] * sum;
        }
}
