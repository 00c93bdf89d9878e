// One tile of attention: R query rows that share a KV head against a stretch of the paged context. Memory beyond a
// sequence's context is never used: masked lanes are dropped, not multiplied by zero.
#pragma once
#include <algorithm>

#include "hadamard.h"
#include "kv_chunk.h"
#include "tile_shape.h"

namespace attention {
constexpr int KEYS = 2 * CHUNK;  // where a window's first tile begins: at a multiple of it
constexpr int SPAN = 128;        // keys per partial result, a multiple of KEYS
constexpr float NEVER = -1e30f;  // score of a masked key: finite, so that differences of two are not NaN
static_assert(CHUNK == vec::LANES, "a vector of scores is a chunk of keys");

typedef AttendCall Job;

// Whether attention is in dual chunks (An et al. 2024): a query sees all keys, but meets those of the chunk before its own,
// and those of all chunks before that, turned by other angles.
INLINE bool dual(const Job& job) { return job.q_behind != 0; }

// Where the chunk of a position starts.
INLINE long chunk_start(const Job& job, long position) { return position - position % -job.window; }

// The first key that the query at a position sees.
INLINE long first_key(const Job& job, long position) {
    if (dual(job)) return 0;
    if (job.window < 0) return chunk_start(job, position);
    return job.window ? std::max<long>(0, position + 1 - job.window) : 0;
}

// Of a token that is in a tree of drafts, the tokens of its sequence's step that it sees: bit i is the i-th. Else 0.
INLINE uint64_t ancestors_of(const Job& job, long token) {
    return job.step->ancestors ? uint64_t(job.step->ancestors[token]) : 0;
}

// Rows [row, row + num_rows) of (token, head of the group) of one sequence and KV head, and their keys [from, to). Rows of
// a tree that do not see all tokens before theirs have keys of a path of their own (attention_paths.h): the last of them
// is their own, and those from copied_from on, the start of a chunk, lie in chunks of the item's own. In dual chunks all rows
// are in one chunk of positions.
struct Item {
    int32_t seq, head, row, num_rows, from, to;
    int32_t copied_from = INT32_MAX;
    char *keys = nullptr, *values = nullptr;

    bool has_path() const { return copied_from != INT32_MAX; }
};

// An unfinished softmax of R rows: the largest score, and relative to it the sum of weights and the weighted values.
template <int R>
struct Sums {
    float most[R], total[R], values[R * MAX_HEAD_DIM];

    void clear(int d) {
        for (int r = 0; r < R; r++) most[r] = NEVER, total[r] = 0;
        std::fill_n(values, R * d, 0.0f);
    }
};

static_assert(MAX_TILE_ROWS <= vec::LANES, "the rows of a tile fit a vector");

// Adds those of a later span; values are [R][d].
template <int R>
void merge(const Sums<R>& span, long d, Sums<R>& sums) {
    alignas(64) float old_factors[vec::LANES], factors[vec::LANES];
    vec::F old_most = vec::load_some(sums.most, R), new_most = vec::load_some(span.most, R);
    vec::F most = vec::max(old_most, new_most);
    vec::store(old_factors, vec::exp(vec::sub(old_most, most)));
    vec::store(factors, vec::exp(vec::sub(new_most, most)));
    vec::store_some(sums.most, most, R);
    for (int r = 0; r < R; r++) {
        sums.total[r] = sums.total[r] * old_factors[r] + factors[r] * span.total[r];
        vec::F factor = vec::set(factors[r]), old_factor = vec::set(old_factors[r]);
        for (int i = r * d; i < (r + 1) * d; i += vec::LANES) {
            vec::F old = vec::mul(vec::load(sums.values + i), old_factor);
            vec::store(sums.values + i, vec::fma(vec::load(span.values + i), factor, old));
        }
    }
}

// Where an item's rows are: in the step, and in their sequence.
struct Place {
    const Job& job;
    const Item& item;
    const long d;
    const int group;  // query heads per KV head

    Place(const Job& job, const Item& item)
        : job(job), item(item), d(job.kv->head_dim), group(job.kv->num_heads / job.kv->num_kv_heads) {}
    long token(int r) const { return job.step->cu_seqlens[item.seq] + (item.row + r) / group; }
    long query_head(int r) const { return item.head * group + (item.row + r) % group; }
    bool in_floats() const { return job.kv->dtype == FLOAT32; }

    template <int R>
    void write(const Sums<R>& sums) const {
        for (int r = 0; r < R; r++) {
            long out = (token(r) * job.kv->num_heads + query_head(r)) * d;
            vec::F inverse = vec::set(1.0f / sums.total[r]);
            alignas(64) float values[MAX_HEAD_DIM];
            std::copy_n(sums.values + r * d, d, values);
            if (transformed_values(*job.kv)) hadamard(values, d);
            for (int i = 0; i < d; i += vec::LANES) {
                vec::F x = vec::mul(vec::load(values + i), inverse);
                in_floats() ? vec::store((float*)job.out + out + i, x) : vec::store((bf16*)job.out + out + i, x);
            }
        }
    }
};

// Keys [from, to) of a sequence, at most SPAN of them, and where their chunks lie.
struct Span {
    int from, to;
    const char *keys[SPAN / CHUNK + 1], *values[SPAN / CHUNK + 1];
    const char* next[SPAN / CHUNK];  // the keys that will be scored after them, as far as there are any
};

template <int R>
struct Tile;

// What depends on how keys, and values, are kept.
template <int R>
struct KeyKernels {
    void (*load_queries)(Tile<R>&);  // those for keys `behind` chunks before
    void (*score)(const Tile<R>&, const Span&, float* scores);  // scores of a span's keys, in rows SPAN apart
};
template <int R>
using ValueKernel = void (*)(const Tile<R>&, const Span&, float* weights, Sums<R>&);  // sums.values = weights . values

template <int R>
struct Tile : Place {
    const long key_bytes, value_bytes;
    const Tile* next_tile = this;  // whose keys are scored after a span, and whether these come after the span's
    bool next_span = true;
    int base;  // position of the sequence's first query token
    KeyKernels<R> keys;
    ValueKernel<R> weigh;
    alignas(64) float queries[R * MAX_HEAD_DIM];  // as keys want them, [D / numbers of a word][R] words
    float factors[R];                             // what a row's numbers are multiples of, times the scale of scores
    int32_t sums[R * MAX_GROUPS];                 // of a row's numbers, by groups of keys
    int first_key[R], end_key[R];
    int behind = 0;   // in dual chunks: which queries are there
    float shifts[R];  // in dual chunks, of keys relative to an origin: their scores' too, which differ with `behind`

    Tile(const Job& job, const Item& item, KeyKernels<R> keys, ValueKernel<R> weigh)
        : Place(job, item), key_bytes(chunk_bytes(job.kv->keys, d)), value_bytes(chunk_bytes(job.kv->values, d)),
          keys(keys), weigh(weigh) {
        int num_tokens = job.step->cu_seqlens[item.seq + 1] - job.step->cu_seqlens[item.seq];
        base = job.step->context_lens[item.seq] - num_tokens;
        for (int r = 0; r < R; r++) {
            end_key[r] = position(r) + 1;
            first_key[r] = int(attention::first_key(job, position(r)));
        }
        keys.load_queries(*this);
    }
    int position(int r) const { return item.has_path() ? item.to - 1 : base + (item.row + r) / group; }

    const char* key_chunk(int key) const { return chunk(job.kv->k, item.keys, key_bytes, key); }
    const char* value_chunk(int key) const { return chunk(job.kv->v, item.values, value_bytes, key); }
    const char* chunk(char* cache, const char* copies, long bytes, int key) const {
        if (key >= item.copied_from) return copies + (key - item.copied_from) / CHUNK * bytes;
        const int32_t* blocks = job.step->block_tables + item.seq * job.step->max_blocks;
        return chunk_at(*job.kv, cache, bytes, blocks[key / job.kv->block_size], item.head, key % job.kv->block_size);
    }

    Span find_span(int from, int to) const {
        Span span{from, to};
        int n = 0;
        for (int key = from; key < to; key += CHUNK, n++)
            span.keys[n] = key_chunk(key), span.values[n] = value_chunk(key);
        span.keys[n] = span.keys[n - 1];  // read beside it and masked: any keys will do
        span.values[n] = span.values[n - 1];
        for (int c = 0, key = next_span ? to : from; c < n; c++, key += CHUNK)
            span.next[c] = key < item.to ? next_tile->key_chunk(key) : span.keys[c];
        return span;
    }

    // Calls body(chunk, lanes [low, high) of its sixteen keys that row r may see).
    template <class Body>
    INLINE void for_chunks(const Tile& t, int r, const Span& span, Body body) {
        for (int c = 0, key = span.from; key < span.to; c++, key += CHUNK) body(c, t.first_key[r] - key, t.end_key[r] - key);
    }

    // A row's scores become weights relative to the largest of them; masked keys weigh nothing.
    INLINE void soften(const Tile& t, int r, const Span& span, float* scores, Sums<R>& sums) {
        vec::F most = vec::set(NEVER), total = vec::zero();
        if (t.first_key[r] <= span.from && t.end_key[r] >= span.to && (span.to - span.from) % CHUNK == 0) {  // all are seen
            const int chunks = (span.to - span.from) / CHUNK;
            for (int c = 0; c < chunks; c++) most = vec::max(most, vec::load(scores + c * CHUNK));
            sums.most[r] = vec::max_lane(most);
            for (int c = 0; c < chunks; c++) {
                vec::F w = vec::exp(vec::sub(vec::load(scores + c * CHUNK), vec::set(sums.most[r])));
                total = vec::add(total, w);
                vec::store(scores + c * CHUNK, w);
            }
            sums.total[r] = vec::sum(total);
            return;
        }
        for_chunks(t, r, span, [&](int c, int low, int high) {
            most = vec::max(most, vec::keep(vec::load(scores + c * CHUNK), low, high, NEVER));
        });
        sums.most[r] = vec::max_lane(most);
        for_chunks(t, r, span, [&](int c, int low, int high) {
            vec::F w = vec::exp(vec::sub(vec::load(scores + c * CHUNK), vec::set(sums.most[r])));
            w = vec::keep(w, low, high, 0.0f);
            total = vec::add(total, w);
            vec::store(scores + c * CHUNK, w);
        });
        sums.total[r] = vec::sum(total);
    }

    // Sums over keys [from, to), at most SPAN of them.
    void sum_span(int from, int to, Sums<R>& sums) {
        if (!dual(job)) return sum_keys(from, to, sums);
        Sums<R> part;
        int end = sum_chunk(from, to, sums);
        while (end < to) {
            end = sum_chunk(end, to, part);
            merge(part, d, sums);
        }
    }

    // In dual chunks: sums over those of the keys [from, to) that the same queries meet. Returns where these end.
    int sum_chunk(int from, int to, Sums<R>& sums) {
        const int own = int(chunk_start(job, position(0))), before = own + int(job.window);
        const int chunks = from >= own ? 0 : from >= before ? 1 : 2;
        const int end = std::min(to, chunks == 0 ? to : chunks == 1 ? own : before);
        if (behind != chunks) {
            behind = chunks;
            keys.load_queries(*this);
        }
        for (int r = 0; r < R; r++) first_key[r] = from, end_key[r] = std::min(end, position(r) + 1);
        sum_keys(from / CHUNK * CHUNK, end, sums);
        if (coded(job.kv->keys))
            for (int r = 0; r < R; r++) sums.most[r] += shifts[r];
        return end;
    }

    // Sums over keys [from, to), at most SPAN of them, with the queries that are there.
    void sum_keys(int from, int to, Sums<R>& sums) const {
        alignas(64) float scores[R * SPAN];
        const Span span = find_span(from, to);
        keys.score(*this, span, scores);
        for (int r = 0; r < R; r++) soften(*this, r, span, scores + r * SPAN, sums);
        weigh(*this, span, scores, sums);
    }
};
}  // namespace attention
