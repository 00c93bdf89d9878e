// Rotary position embedding (Su et al. 2021; halves of the rotary part pair up, as in GPT-NeoX) fused with the store of
// K and V into the paged cache, rounded where it keeps codes.
#include <algorithm>

#include "hadamard.h"
#include "kv_codes.h"
#include "parallel.h"

namespace {
constexpr long GRAIN_ELEMENTS = 8 * 1024;  // less is not worth another thread

struct Angles {
    const float *cos, *sin;  // [half] each
    long half;               // rotary_dim / 2
};

// Dimensions beyond the rotary part pass unchanged. in == out is fine.
template <class E>
void rotate(const E* in, const Angles& angles, long head_dim, E* out) {
    vec::for_lanes(angles.half, [&](long i, int lanes) {
        vec::F a = vec::load_some(in + i, lanes), b = vec::load_some(in + angles.half + i, lanes);
        vec::F c = vec::load_some(angles.cos + i, lanes), s = vec::load_some(angles.sin + i, lanes);
        vec::store_some(out + i, vec::sub(vec::mul(a, c), vec::mul(b, s)), lanes);
        vec::store_some(out + angles.half + i, vec::add(vec::mul(b, c), vec::mul(a, s)), lanes);
    });
    long rotary = 2 * angles.half;
    memcpy(out + rotary, in + rotary, (head_dim - rotary) * sizeof(E));
}

template <class E>
void store_plain_key(const E* k, long d, char* chunk, long at) {
    constexpr long P = 4 / sizeof(E);
    uint32_t* words = (uint32_t*)chunk + at;
    for (long i = 0; i < d / P; i++) memcpy(words + i * CHUNK, k + i * P, 4);
}

template <class E>
void store_plain_value(const E* v, long d, char* chunk, long at) {
    constexpr long P = 4 / sizeof(E);
    E* values = (E*)chunk + at / P * P * d + at % P;
    for (long i = 0; i < d; i++) values[i * P] = v[i];
}

template <class E>
void widened(const E* x, long head_dim, float* out) {
    for (long i = 0; i < head_dim; i += vec::LANES) vec::store(out + i, vec::load(x + i));
}

template <class E>
void transformed(const E* x, long head_dim, float* out) {
    widened(x, head_dim, out);
    hadamard(out, head_dim);
}

char* chunk_of(const PagedKV& kv, char* cache, const Kept& kept, int64_t slot, int head) {
    return chunk_at(kv, cache, chunk_bytes(kept, kv.head_dim), slot / kv.block_size, head, slot % kv.block_size);
}

// A rotated key; where keys are rounded, relative to `origin`.
template <class E>
void store_key_at(const PagedKV& kv, int64_t slot, int head, const E* k, const Origin* origin) {
    const long d = kv.head_dim, at = slot % CHUNK;
    char* chunk = chunk_of(kv, kv.k, kv.keys, slot, head);
    if (!coded(kv.keys)) return store_plain_key(k, d, chunk, at);
    float x[MAX_HEAD_DIM];
    transformed(k, d, x);
    for (long i = 0; i < d; i++) x[i] -= origin->scale * (int(origin->codes[i]) - Code8::ZERO);
    with_codes(kv.keys.storage, [&](auto code) { store_key<decltype(code)>(x, kv.keys, d, chunk, at); });
}

template <class E>
void store_value_at(const PagedKV& kv, int64_t slot, int head, const E* v) {
    const long d = kv.head_dim, at = slot % CHUNK;
    char* chunk = chunk_of(kv, kv.v, kv.values, slot, head);
    if (!coded(kv.values)) return store_plain_value(v, d, chunk, at);
    float x[MAX_HEAD_DIM];
    transformed_values(kv) ? transformed(v, d, x) : widened(v, d, x);
    with_codes(kv.values.storage, [&](auto code) { store_value<decltype(code)>(x, kv.values, d, chunk, at); });
}

// Of a token's key, and of its query for keys that lie `behind` chunks before its own.
Angles angles_of(const RopeAndStoreCall& c, long token, long behind = 0) {
    long position = c.step->positions[token];
    if (c.chunk) position = std::min<long>(position % c.chunk + behind * c.chunk, c.farthest);
    const float* row = c.cos_sin + position * c.rotary_dim;
    return {row, row + c.rotary_dim / 2, c.rotary_dim / 2};
}

// As how far behind a token's query has to be there for keys.
long most_behind(const RopeAndStoreCall& c, long token) {
    return c.chunk ? std::min<long>(2, c.step->positions[token] / c.chunk) : 0;
}

// Before other tokens are stored relative to them: the first keys of sequences that begin in this step.
template <class E>
void store_origins(const RopeAndStoreCall& c) {
    const PagedKV& kv = *c.kv;
    const Step& step = *c.step;
    for (long seq = 0; seq < step.num_seqs; seq++) {
        long t = step.cu_seqlens[seq], d = kv.head_dim;
        if (t == step.cu_seqlens[seq + 1] || step.positions[t] != 0) continue;
        for (int h = 0; h < kv.num_kv_heads; h++) {
            E rotated[MAX_HEAD_DIM];
            float x[MAX_HEAD_DIM];
            rotate((const E*)c.k + t * c.k_stride + h * d, angles_of(c, t), d, rotated);
            transformed(rotated, d, x);
            Origin* origin = origin_of(kv, step.block_tables[seq * step.max_blocks], h);
            float middle;
            round_group<Code8>(x, d, false, origin->codes, origin->scale, middle);
        }
    }
}

// The first block of a token's sequence.
long first_block(const Step& step, long token) {
    long seq = std::upper_bound(step.cu_seqlens, step.cu_seqlens + step.num_seqs, token) - step.cu_seqlens - 1;
    return step.block_tables[seq * step.max_blocks];
}

// Tokens [token, end) go to one chunk, whose values one thread stores: codes of 4 bits share bytes. For a token that is
// not the first of them nothing is left to do.
long end_of_chunk(const Step& step, long token) {
    auto chunk = [&](long t) { return step.slots[t] / CHUNK; };
    if (token > 0 && chunk(token - 1) == chunk(token)) return token;
    long end = token + 1;
    while (end < step.num_tokens && chunk(end) == chunk(token)) end++;
    return end;
}

template <class E>
void rope_and_store(const RopeAndStoreCall& c) {
    const PagedKV& kv = *c.kv;
    const Step& step = *c.step;
    long d = kv.head_dim, heads = kv.num_heads + kv.num_kv_heads;
    long grain = std::max(1L, GRAIN_ELEMENTS / (heads * d));
    if (coded(kv.keys)) store_origins<E>(c);
    parallel_for(c.threads, step.num_tokens, grain, [&](long t, int) {
        Angles angles = angles_of(c, t);
        const E *q = (const E*)c.q + t * c.q_stride, *k = (const E*)c.k + t * c.k_stride;
        for (int h = 0; h < kv.num_heads; h++)
            rotate(q + h * d, angles, d, (E*)c.q_out + (t * kv.num_heads + h) * d);
        for (long behind = 1, last = most_behind(c, t); behind <= last; behind++)
            for (int h = 0; h < kv.num_heads; h++)
                rotate(q + h * d, angles_of(c, t, behind), d,
                       (E*)c.q_out + ((behind * step.num_tokens + t) * kv.num_heads + h) * d);
        for (int h = 0; h < kv.num_kv_heads; h++) {
            E* rotated = (E*)c.k_out + (t * kv.num_kv_heads + h) * d;
            rotate(k + h * d, angles, d, rotated);
            store_key_at(kv, step.slots[t], h, rotated, coded(kv.keys) ? origin_of(kv, first_block(step, t), h) : nullptr);
        }
        for (long u = t, end = end_of_chunk(step, t); u < end; u++)
            for (int h = 0; h < kv.num_kv_heads; h++)
                store_value_at(kv, step.slots[u], h, (const E*)c.v + u * c.v_stride + h * d);
    });
}
}  // namespace

EXPORT int blade_rope_and_store(const RopeAndStoreCall* call) {
    return with_dtype(call->kv->dtype, [&](auto e) { rope_and_store<decltype(e)>(*call); }), OK;
}
