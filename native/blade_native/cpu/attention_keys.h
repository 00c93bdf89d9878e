// Scores of a span's keys, for each way in which keys are kept.
#pragma once
#include "attention_rows.h"
#include "attention_tile.h"

namespace attention {
// x [d], transformed, times the key that those of the tile's sequence are relative to.
template <int R>
INLINE float dot_origin(const Tile<R>& t, const float* x) {
    const Origin* origin = origin_of(*t.job.kv, t.job.step->block_tables[t.item.seq * t.job.step->max_blocks], t.item.head);
    float sum = 0;
    for (int i = 0; i < t.d; i++) sum += x[i] * (int(origin->codes[i]) - Code8::ZERO);
    return origin->scale * sum;
}

template <class E, int R>
__attribute__((noinline)) void load_queries(Tile<R>& t) {
    typedef typename Word<E>::Activation A;
    constexpr int PA = 4 / sizeof(A);
    A* queries = (A*)t.queries;
    for (int r = 0; r < R; r++) {
        const long at = t.behind * t.job.q_behind + t.token(r) * t.job.q_stride + t.query_head(r) * t.d;
        float x[MAX_HEAD_DIM], factor = 1;
        A numbers[MAX_HEAD_DIM];
        for (int i = 0; i < t.d; i += vec::LANES)
            vec::store(x + i, t.in_floats() ? vec::load((const float*)t.job.q + at + i) : vec::load((const bf16*)t.job.q + at + i));
        if constexpr (CODED<E>) {
            hadamard(x, t.d);
            if (dual(t.job)) t.shifts[r] = t.job.scale * dot_origin(t, x);
        }
        if constexpr (INTEGER<E>) {
            factor = make_shorts(x, t.d, t.job.kv->keys.group, numbers, t.sums + r * MAX_GROUPS);
        } else if constexpr (CODED<E>) {
            for (int i = 0; i < t.d; i++) numbers[i] = x[i] * ACTIVATION_UNIT;
            factor = E::UNIT / ACTIVATION_UNIT;
        } else {
            for (int i = 0; i < t.d; i++) vec::from_float(x[i], numbers[i]);
        }
        for (int i = 0; i < t.d; i++) queries[(i / PA * R + r) * PA + i % PA] = numbers[i];
        t.factors[r] = factor * t.job.scale;
    }
}

// Of the keys of chunks [c, c + NV) the part of their scores that the group's channels make.
template <class E, int R, int NV>
INLINE void score_group(const Tile<R>& t, const Span& span, int c, long g, float* scores) {
    typedef typename Word<E>::Activation A;
    constexpr int P = Word<E>::ELEMENTS, PA = 4 / sizeof(A);
    const long d = t.d, group = CODED<E> ? t.job.kv->keys.group : d, begin = g * group;
    const uint32_t* words[NV];
    const char* ahead[NV];  // the values that are weighed once all scores are there
    typename Word<E>::Sum s[R][NV];
    for (int v = 0; v < NV; v++) {
        words[v] = (const uint32_t*)span.keys[c + v] + begin / P * CHUNK;
        ahead[v] = span.values[c + v] + begin / P * 64;
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) s[r][v] = first_sum<E>(t.sums[r * MAX_GROUPS + g]);
    dot_tile<E, R, NV>((const uint32_t*)t.queries + begin / PA * R, 1, R, words, CHUNK, group / P, ahead, s);
    asm volatile("" ::: "memory");  // or GCC 12 would keep all rows' factors in registers that the loop needs
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) {
            vec::F x = total(s[r][v], t.factors[r]);
            if constexpr (CODED<E>) x = vec::mul(x, vec::load(numbers_of<E>(span.keys[c + v], d, g)));
            if constexpr (INTEGER<E>)
                if (t.job.kv->keys.affine) {
                    vec::F all = vec::set(t.factors[r] * t.sums[r * MAX_GROUPS + g]);
                    x = vec::fma(all, vec::load(numbers_of<E>(span.keys[c + v], d, d / group + g)), x);
                }
            float* score = scores + r * SPAN + (c + v) * CHUNK;
            vec::store(score, g ? vec::add(vec::load(score), x) : x);
        }
}

template <class E, int R>
__attribute__((noinline)) void score(const Tile<R>& t, const Span& span, float* scores) {
    constexpr int NV = TILE_VECTORS<R>;
    const long num_groups = CODED<E> ? t.d / t.job.kv->keys.group : 1;
    for (int c = 0, key = span.from; key < span.to; c += NV, key += NV * CHUNK)
        for (long g = 0; g < num_groups; g++) score_group<E, R, NV>(t, span, c, g, scores);
}
}  // namespace attention
