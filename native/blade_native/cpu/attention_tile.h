// One tile of attention: R query rows that share a KV head against a stretch of the paged context. Memory beyond a
// sequence's context is never used: masked lanes are dropped, not multiplied by zero.
#pragma once
#include <algorithm>

#include "attention_rows.h"

namespace attention {
constexpr int KEYS = 2 * CHUNK;  // where a window's first tile begins: at a multiple of it
constexpr int SPAN = 128;        // keys per partial result, a multiple of KEYS
constexpr float NEVER = -1e30f;  // score of a masked key: finite, so that differences of two are not NaN
static_assert(CHUNK == vec::LANES, "a vector of scores is a chunk of keys");

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

// Keys [from, to) of a sequence, at most SPAN of them, and where their chunks lie.
struct Span {
    int from, to;
    const char *keys[SPAN / CHUNK + 1], *values[SPAN / CHUNK];
};

// A cache of E; q and the output are of its type, or with Code of job.kv->dtype.
template <class E, int R>
struct Tile {
    typedef typename Word<E>::Activation A;  // queries and weights
    typedef typename Word<E>::Sum Sum;
    static constexpr int P = Word<E>::ELEMENTS, PA = 4 / sizeof(A);
    const Job& job;
    const Item& item;
    const long d;
    int group, base;  // query heads per KV head; position of the sequence's first query token
    A queries[R * MAX_HEAD_DIM];  // [D / PA][R] words
    Row<E> query_rows[R];
    int first_key[R], end_key[R];

    Tile(const Job& job, const Item& item) : job(job), item(item), d(job.kv->head_dim) {
        int num_tokens = job.step->cu_seqlens[item.seq + 1] - job.step->cu_seqlens[item.seq];
        group = job.kv->num_heads / job.kv->num_kv_heads;
        base = job.step->context_lens[item.seq] - num_tokens;
        for (int r = 0; r < R; r++) {
            end_key[r] = base + (item.row + r) / group + 1;
            first_key[r] = job.window ? std::max<int64_t>(0, end_key[r] - job.window) : 0;
            load_query(r, token(r) * job.q_stride + query_head(r) * d);
        }
    }
    long token(int r) const { return job.step->cu_seqlens[item.seq] + (item.row + r) / group; }
    long query_head(int r) const { return item.head * group + (item.row + r) % group; }
    bool in_floats() const { return SCALED<E> ? job.kv->dtype == FLOAT32 : sizeof(E) == sizeof(float); }

    void load_query(int r, long at) {
        float x[MAX_HEAD_DIM];
        for (int i = 0; i < d; i += vec::LANES)
            vec::store(x + i, in_floats() ? vec::load((const float*)job.q + at + i) : vec::load((const bf16*)job.q + at + i));
        if constexpr (SCALED<E>) {
            A numbers[MAX_HEAD_DIM];
            hadamard(x, d);
            query_rows[r] = make_row(x, d, numbers);
            for (int i = 0; i < d; i++) queries[(i / PA * R + r) * PA + i % PA] = numbers[i];
        } else {
            for (int i = 0; i < d; i++) vec::from_float(x[i], queries[(i / PA * R + r) * PA + i % PA]);
        }
        query_rows[r].factor *= job.scale;
    }

    const char* chunk(char* cache, int key) const {
        const int32_t* blocks = job.step->block_tables + item.seq * job.step->max_blocks;
        return chunk_at<E>(*job.kv, cache, blocks[key / job.kv->block_size], item.head, key % job.kv->block_size);
    }

    Span find_span(int from, int to) const {
        Span span{from, to};
        int n = 0;
        for (int key = from; key < to; key += CHUNK, n++)
            span.keys[n] = chunk(job.kv->k, key), span.values[n] = chunk(job.kv->v, key);
        span.keys[n] = span.keys[n - 1];  // read beside it and masked: any keys will do
        return span;
    }

    // Blocks lie apart, so the hardware does not see what comes next.
    INLINE void prefetch(const Tile& t, char* cache, int key) {
        if (key >= t.item.to) return;
        const char* at = t.chunk(cache, key);
        for (long i = 0; i < chunk_bytes<E>(t.d); i += 64) __builtin_prefetch(at + i, 0, 2);
    }

    // Scores of the keys of chunks [c, c + NV), in rows SPAN apart.
    template <int NV>
    INLINE void score(const Tile& t, const Span& span, int c, float* scores) {
        const long d = t.d;
        const uint32_t* words[NV];
        for (int v = 0; v < NV; v++) words[v] = (const uint32_t*)span.keys[c + v];
        Sum s[R][NV];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) s[r][v] = Row<E>::start(t.query_rows[r]);
        dot_tile<E, R, NV>((const uint32_t*)t.queries, 1, R, words, CHUNK, d / P, s);
        asm volatile("" ::: "memory");  // or GCC 12 would keep all rows' factors in registers that the loop needs
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) {
                vec::F x = Row<E>::total(s[r][v], t.query_rows[r]);
                if constexpr (SCALED<E>) x = vec::mul(x, vec::load(chunk_scales(span.keys[c + v], d)));
                vec::store(scores + r * SPAN + (c + v) * CHUNK, x);
            }
    }

    // Calls body(chunk, lanes [low, high) of its sixteen keys that row r may see).
    template <class Body>
    INLINE void for_chunks(const Tile& t, int r, const Span& span, Body body) {
        for (int c = 0, key = span.from; key < span.to; c++, key += CHUNK) body(c, t.first_key[r] - key, t.end_key[r] - key);
    }

    // A row's scores become weights relative to the largest of them, times the scales of the values where they have any;
    // masked keys weigh nothing.
    INLINE Row<E> soften(const Tile& t, int r, const Span& span, float* scores, A* weights, Sums<R>& sums) {
        vec::F most = vec::set(NEVER), total = vec::zero();
        for_chunks(t, r, span, [&](int c, int low, int high) {
            most = vec::max(most, vec::keep(vec::load(scores + c * CHUNK), low, high, NEVER));
        });
        sums.most[r] = vec::max_lane(most);
        for_chunks(t, r, span, [&](int c, int low, int high) {
            vec::F w = vec::exp(vec::sub(vec::load(scores + c * CHUNK), vec::set(sums.most[r])));
            w = vec::keep(w, low, high, 0.0f);
            total = vec::add(total, w);
            if constexpr (SCALED<E>) {
                w = vec::mul(w, vec::load(chunk_scales(span.values[c], t.d)));
                vec::store(scores + c * CHUNK, vec::keep(w, low, high, 0.0f));
            } else {
                vec::store(weights + c * CHUNK, w);
            }
        });
        sums.total[r] = vec::sum(total);
        if constexpr (!SCALED<E>)
            return {};
        else
            return make_row(scores, (span.to - span.from + CHUNK - 1) / CHUNK * CHUNK, weights);
    }

    // sums.values[:, i : i + 16 NV] = weights . values of the span.
    template <int NV>
    INLINE void weigh_values(const Tile& t, int i, const Span& span, const A* weights, const Row<E> (&rows)[R], Sums<R>& sums) {
        const long d = t.d;
        Sum s[R][NV];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++) s[r][v] = Row<E>::start(rows[r]);
        for (int c = 0, left = span.to - span.from; left > 0; c++, left -= CHUNK) {
            // Codes that no key of the sequence has meet weights of zero; floats there could be NaN.
            int num_keys = std::min(left, CHUNK), num_words = (num_keys + (SCALED<E> ? P - 1 : 0)) / P;
            const uint32_t* a = (const uint32_t*)(weights + c * CHUNK);
            const uint32_t* words[NV];
            for (int v = 0; v < NV; v++) words[v] = (const uint32_t*)span.values[c] + i + v * vec::LANES;
            dot_tile<E, R, NV>(a, SPAN / PA, 1, words, d, num_words, s);
            if constexpr (!SCALED<E>)
                if (num_keys % P) add_half_word<NV>(a + num_keys / PA - (PA == 1), words, num_words * d, s);
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NV; v++)
                vec::store(sums.values + r * d + i + v * vec::LANES, Row<E>::total(s[r][v], rows[r]));
    }

    // The last word, whose second half holds no key of this sequence.
    template <int NV>
    INLINE void add_half_word(const uint32_t* a, const uint32_t* const (&words)[NV], long at, Sum (&s)[R][NV]) {
        for (int v = 0; v < NV; v++) {
            vec::W half = Word<E>::first_element(vec::word(words[v] + at));
            for (int r = 0; r < R; r++) s[r][v] = Word<E>::dot(s[r][v], half, vec::splat(a + r * SPAN / PA));
        }
    }

    // Sums over keys [from, to), at most SPAN of them.
    void sum_span(int from, int to, Sums<R>& sums) const {
        float scores[R * SPAN];
        A weights[R * SPAN];
        Row<E> rows[R];
        constexpr int NV = TILE_VECTORS<R>;
        const Span span = find_span(from, to);
        for (int c = 0, key = from; key < to; c += NV, key += NV * CHUNK) {
            for (int v = 0; v < NV; v++) {
                prefetch(*this, job.kv->k, key + (v + 2) * CHUNK);
                prefetch(*this, job.kv->v, key + v * CHUNK);
            }
            score<NV>(*this, span, c, scores);
        }
        for (int r = 0; r < R; r++)
            rows[r] = soften(*this, r, span, scores + r * SPAN, weights + r * SPAN, sums);
        int i = 0;
        for (; i + NV * vec::LANES <= d; i += NV * vec::LANES) weigh_values<NV>(*this, i, span, weights, rows, sums);
        if (i < d) weigh_values<1>(*this, i, span, weights, rows, sums);
    }

    void merge(const Sums<R>& span, Sums<R>& sums) const {
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
        for (int r = 0; r < R; r++) {
            long out = (token(r) * job.kv->num_heads + query_head(r)) * d;
            vec::F inverse = vec::set(1.0f / sums.total[r]);
            for (int i = 0; i < d; i += vec::LANES) {
                vec::F x = vec::mul(vec::load(sums.values + r * d + i), inverse);
                in_floats() ? vec::store((float*)job.out + out + i, x) : vec::store((bf16*)job.out + out + i, x);
            }
        }
    }
};
}  // namespace attention
