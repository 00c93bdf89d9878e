// One tile of attention: R query rows that share a KV head against a stretch of the paged context. Memory beyond a
// sequence's context is never used: masked lanes are dropped, not multiplied by zero.
#pragma once
#include <algorithm>

#include "api.h"
#include "dot.h"

namespace attention {
constexpr int KEYS = 2 * vec::LANES;  // where a window's first tile begins: at a multiple of it
constexpr int SPAN = 256;             // keys per partial result, a multiple of KEYS
constexpr int MAX_HEAD_DIM = 256;
constexpr float NEVER = -1e30f;  // score of a masked key: finite, so that differences of two are not NaN

typedef AttendCall Job;

// Rows [row, row + num_rows) of (token, head of the group) of one sequence and KV head, and their keys [from, to).
struct Item {
    int32_t seq, head, row, num_rows, from, to;
};

// An unfinished softmax of R rows: the largest score, and relative to it the sum of weights and the weighted values.
template <int R>
struct Sums {
    float most[R], total[R], values[R * MAX_HEAD_DIM];

    void clear(int d) {
        for (int r = 0; r < R; r++) most[r] = NEVER, total[r] = 0;
        std::fill_n(values, R * d, 0.0f);
    }
    void rescale(int r, int d, float factor) {
        total[r] *= factor;
        for (int i = 0; i < d; i += vec::LANES)
            vec::store(values + r * d + i, vec::mul(vec::load(values + r * d + i), vec::set(factor)));
    }
};

float exp_of_difference(float a, float b) {
    float lanes[vec::LANES];
    vec::store(lanes, vec::exp(vec::set(a - b)));
    return lanes[0];
}

template <class E, int R>
struct Tile {
    typedef typename Word<E>::Activation A;  // queries and weights
    static constexpr int P = Word<E>::ELEMENTS, PA = 4 / sizeof(A);
    const Job& job;
    const Item& item;
    int group, base;  // query heads per KV head; position of the sequence's first query token
    A queries[R * MAX_HEAD_DIM];  // [D / PA][R] words
    int first_key[R], end_key[R];

    Tile(const Job& job, const Item& item) : job(job), item(item) {
        int num_tokens = job.step->cu_seqlens[item.seq + 1] - job.step->cu_seqlens[item.seq];
        group = job.kv->num_heads / job.kv->num_kv_heads;
        base = job.step->context_lens[item.seq] - num_tokens;
        for (int r = 0; r < R; r++) {
            end_key[r] = base + (item.row + r) / group + 1;
            first_key[r] = job.window ? std::max<int64_t>(0, end_key[r] - job.window) : 0;
            const E* q = (const E*)job.q + token(r) * job.q_stride + query_head(r) * job.kv->head_dim;
            for (int i = 0; i < job.kv->head_dim; i++) {
                A* at = queries + (i / PA * R + r) * PA + i % PA;
                if constexpr (sizeof(A) == sizeof(E))
                    memcpy(at, q + i, sizeof(E));
                else
                    *at = vec::to_float(q[i]);
            }
        }
    }
    long token(int r) const { return job.step->cu_seqlens[item.seq] + (item.row + r) / group; }
    long query_head(int r) const { return item.head * group + (item.row + r) % group; }

    // Offset in elements of the sixteen keys (or values) from `key` on.
    long address(int key) const {
        const int32_t* blocks = job.step->block_tables + item.seq * job.step->max_blocks;
        long size = job.kv->block_size, block = blocks[key / size];
        return ((block * job.kv->num_kv_heads + item.head) * size + key % size) * job.kv->head_dim;
    }

    // Blocks lie apart, so the hardware does not see what comes next: the sixteen keys (or values) from `key` on.
    INLINE void prefetch(const Tile& t, const char* cache, int key) {
        if (key >= t.item.to) return;
        const char* at = cache + t.address(key) * long(sizeof(E));
        for (long i = 0; i < vec::LANES * t.job.kv->head_dim * long(sizeof(E)); i += 64) __builtin_prefetch(at + i, 0, 2);
    }

    // Scores of keys [key, key + 16 NV), in rows SPAN apart.
    template <int NV>
    INLINE void score(const Tile& t, int key, int to, float* scores) {
        const uint32_t* words[NV];
        for (int v = 0; v < NV; v++)  // what lies beyond the last key is masked later: any key will do
            words[v] = (const uint32_t*)((const E*)t.job.kv->k + t.address(std::min(key + v * vec::LANES, to - 1) / 16 * 16));
        vec::F s[R][NV];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) s[r][v] = vec::zero();
        dot_tile<E, R, NV>((const uint32_t*)t.queries, 1, R, words, vec::LANES, t.job.kv->head_dim / P, s);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++)
                vec::store(scores + r * SPAN + v * vec::LANES, vec::mul(s[r][v], vec::set(t.job.scale)));
    }

    // Calls body(offset, lanes [low, high) of sixteen keys that row r may see) over keys [from, to).
    template <class Body>
    INLINE void for_keys(const Tile& t, int r, int from, int to, Body body) {
        for (int i = 0; i < to - from; i += vec::LANES) body(i, t.first_key[r] - from - i, t.end_key[r] - from - i);
    }

    // A row's scores of keys [from, to) become weights relative to the largest of them; masked keys weigh nothing.
    INLINE void soften(const Tile& t, int r, int from, int to, const float* scores, A* weights, Sums<R>& sums) {
        vec::F most = vec::set(NEVER), total = vec::zero();
        for_keys(t, r, from, to, [&](int i, int low, int high) {
            most = vec::max(most, vec::keep(vec::load(scores + i), low, high, NEVER));
        });
        sums.most[r] = vec::max_lane(most);
        for_keys(t, r, from, to, [&](int i, int low, int high) {
            vec::F w = vec::exp(vec::sub(vec::load(scores + i), vec::set(sums.most[r])));
            w = vec::keep(w, low, high, 0.0f);
            total = vec::add(total, w);
            vec::store(weights + i, w);
        });
        sums.total[r] = vec::sum(total);
    }

    // sums.values[:, i : i + 16 NV] = weights . values of keys [from, to).
    template <int NV>
    INLINE void weigh_values(const Tile& t, int i, int from, int to, const A* weights, Sums<R>& sums) {
        const int d = t.job.kv->head_dim;
        vec::F c[R][NV];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) c[r][v] = vec::zero();
        for (int key = from; key < to; key += vec::LANES) {
            int num_keys = std::min(to - key, vec::LANES);
            const uint32_t* a = (const uint32_t*)(weights + key - from);
            const uint32_t* words[NV];
            for (int v = 0; v < NV; v++)
                words[v] = (const uint32_t*)((const E*)t.job.kv->v + t.address(key)) + i + v * vec::LANES;
                dot_tile<E, R, NV>(a, SPAN / PA, 1, words, d, num_keys / P, c);
            if (num_keys % P) {  // the other half of the last word holds no key of this sequence
                for (int v = 0; v < NV; v++) {
                    vec::W half = Word<E>::first_element(vec::word(words[v] + num_keys / P * d));
                    for (int r = 0; r < R; r++)
                        c[r][v] = Word<E>::dot(c[r][v], half, vec::splat(a + r * SPAN / PA + num_keys / PA - (PA == 1)));
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) vec::store(sums.values + r * d + i + v * vec::LANES, c[r][v]);
    }

    // Sums over keys [from, to), at most SPAN of them.
    void sum_span(int from, int to, Sums<R>& sums) const {
        float scores[R * SPAN];
        A weights[R * SPAN];
        constexpr int NV = TILE_VECTORS<R>;
        for (int key = from; key < to; key += NV * vec::LANES) {
            for (int v = 0; v < NV; v++) {
                prefetch(*this, job.kv->k, key + (v + 2) * vec::LANES);
                prefetch(*this, job.kv->v, key + v * vec::LANES);
            }
            score<NV>(*this, key, to, scores + key - from);
        }
        for (int r = 0; r < R; r++) soften(*this, r, from, to, scores + r * SPAN, weights + r * SPAN, sums);
        int i = 0;
        for (; i + NV * vec::LANES <= job.kv->head_dim; i += NV * vec::LANES)
            weigh_values<NV>(*this, i, from, to, weights, sums);
        if (i < job.kv->head_dim) weigh_values<1>(*this, i, from, to, weights, sums);
    }

    void merge(const Sums<R>& span, Sums<R>& sums) const {
        const int d = job.kv->head_dim;
        for (int r = 0; r < R; r++) {
            float most = std::max(sums.most[r], span.most[r]);
            float factor = exp_of_difference(span.most[r], most);
            sums.rescale(r, d, exp_of_difference(sums.most[r], most));
            sums.most[r] = most;
            sums.total[r] += factor * span.total[r];
            for (int i = r * d; i < (r + 1) * d; i += vec::LANES)
                vec::store(sums.values + i,
                           vec::fma(vec::load(span.values + i), vec::set(factor), vec::load(sums.values + i)));
        }
    }

    void write(const Sums<R>& sums) const {
        const int d = job.kv->head_dim;
        for (int r = 0; r < R; r++) {
            E* out = (E*)job.out + (token(r) * job.kv->num_heads + query_head(r)) * d;
            vec::F inverse = vec::set(1.0f / sums.total[r]);
            for (int i = 0; i < d; i += vec::LANES)
                vec::store(out + i, vec::mul(vec::load(sums.values + r * d + i), inverse));
        }
    }
};
}  // namespace attention
