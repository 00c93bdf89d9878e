// The weighted values of a span, for each way in which values are kept.
#pragma once
#include "attention_rows.h"
#include "attention_tile.h"

namespace attention {
// Weights as a group of a cache's channels wants them, rows SPAN apart.
template <class E, int R>
struct Weights {
    typedef typename Word<E>::Activation A;
    alignas(64) A numbers[R * SPAN];
    float factors[R], offsets[R];  // an offset is what the middles of affine codes add to every channel
    int32_t sums[R];
};

// Row r's weights [SPAN], masked ones 0, times the scales of the group's values.
template <class E, int R>
INLINE void weigh_scales(const Tile<R>& t, int r, const Span& span, long g, const float* weights, Weights<E, R>& out) {
    const int n = (span.to - span.from + CHUNK - 1) / CHUNK * CHUNK;
    out.offsets[r] = out.sums[r] = 0;
    out.factors[r] = 1;
    if constexpr (!CODED<E>) {
        for (int i = 0; i < n; i += vec::LANES) vec::store(out.numbers + r * SPAN + i, vec::load(weights + i));
    } else {
        float scaled[SPAN];
        vec::F offset = vec::zero();
        const bool affine = INTEGER<E> && t.job.kv->values.affine;
        Tile<R>::for_chunks(t, r, span, [&](int c, int low, int high) {
            const char* chunk = span.values[c];
            vec::F w = vec::load(weights + c * CHUNK), scales = vec::load(numbers_of<E>(chunk, t.d, g));
            vec::store(scaled + c * CHUNK, vec::keep(vec::mul(w, scales), low, high, 0.0f));
            if (affine) {
                vec::F middles = vec::load(numbers_of<E>(chunk, t.d, t.d / t.job.kv->values.group + g));
                offset = vec::add(offset, vec::keep(vec::mul(w, middles), low, high, 0.0f));
            }
        });
        if (affine) out.offsets[r] = vec::sum(offset);
        if constexpr (INTEGER<E>) {
            out.factors[r] = make_shorts(scaled, n, n, out.numbers + r * SPAN, &out.sums[r]);
        } else {
            for (int i = 0; i < n; i += vec::LANES)
                vec::store(out.numbers + r * SPAN + i, vec::mul(vec::load(scaled + i), vec::set(ACTIVATION_UNIT)));
            out.factors[r] = E::UNIT / ACTIVATION_UNIT;
        }
    }
}

// The last word, whose second half holds no key of this sequence.
template <class E, int R, int NV>
INLINE void add_half_word(const uint32_t* a, long a_row, const uint32_t* const (&words)[NV], long at,
                          typename Word<E>::Sum (&s)[R][NV]) {
    for (int v = 0; v < NV; v++) {
        vec::W half = Word<E>::first_element(vec::word(words[v] + at));
        for (int r = 0; r < R; r++) s[r][v] = Word<E>::dot(s[r][v], half, vec::splat(a + r * a_row));
    }
}

// sums.values[:, i : i + 16 NV] = weights . values of the span.
template <class E, int R, int NV>
INLINE void weigh_channels(const Tile<R>& t, const Span& span, int i, const Weights<E, R>& weights, Sums<R>& sums) {
    constexpr int P = Word<E>::ELEMENTS, PA = 4 / sizeof(typename Word<E>::Activation);
    const long d = t.d;
    typename Word<E>::Sum s[R][NV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) s[r][v] = first_sum<E>(weights.sums[r]);
    for (int c = 0, left = span.to - span.from; left > 0; c++, left -= CHUNK) {
        // Codes that no key of the sequence has meet weights of zero; floats there could be NaN.
        int num_keys = std::min(left, CHUNK), num_words = (num_keys + (CODED<E> ? P - 1 : 0)) / P;
        const uint32_t* a = (const uint32_t*)(weights.numbers + c * CHUNK);
        const uint32_t* words[NV];
        const char* ahead[NV];
        for (int v = 0; v < NV; v++) {
            words[v] = (const uint32_t*)span.values[c] + i + v * vec::LANES;
            ahead[v] = span.next[c] + (i / vec::LANES + v) * (CHUNK / P) * 64;
        }
        dot_tile<E, R, NV>(a, SPAN / PA, 1, words, d, num_words, ahead, s);
        if constexpr (!CODED<E>)
            if (num_keys % P) add_half_word<E>(a + num_keys / PA - (PA == 1), SPAN / PA, words, num_words * d, s);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) {
            vec::F x = vec::add(total(s[r][v], weights.factors[r]), vec::set(weights.offsets[r]));
            vec::store(sums.values + r * d + i + v * vec::LANES, x);
        }
}

template <class E, int R>
__attribute__((noinline)) void weigh(const Tile<R>& t, const Span& span, float* softened, Sums<R>& sums) {
    constexpr int NV = TILE_VECTORS<R>, WIDTH = NV * vec::LANES;
    const int group = CODED<E> ? t.job.kv->values.group : t.d;
    Weights<E, R> weights;
    for (int g = 0; g * group < t.d; g++) {
        for (int r = 0; r < R; r++) weigh_scales(t, r, span, g, softened + r * SPAN, weights);
        int i = g * group, end = i + group;
        for (; i + WIDTH <= end; i += WIDTH) weigh_channels<E, R, NV>(t, span, i, weights, sums);
        if (i < end) weigh_channels<E, R, 1>(t, span, i, weights, sums);
    }
}
}  // namespace attention
