// Rotary position embedding (Su et al. 2021; halves of the rotary part pair up, as in GPT-NeoX) fused with the store of
// K and V into the paged cache, in int8 where that is its storage.
#include <algorithm>

#include "hadamard.h"
#include "kv_chunk.h"
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

// One token's key and value, as they are.
template <class E>
void store(const PagedKV& kv, int64_t slot, int head, const E* k, const E* v) {
    constexpr long P = 4 / sizeof(E);
    long d = kv.head_dim, at = slot % CHUNK;
    uint32_t* keys = (uint32_t*)chunk_at<E>(kv, kv.k, slot / kv.block_size, head, slot % kv.block_size) + at;
    for (long i = 0; i < d / P; i++) memcpy(keys + i * CHUNK, k + i * P, 4);
    E* values = (E*)chunk_at<E>(kv, kv.v, slot / kv.block_size, head, slot % kv.block_size) + at / P * P * d + at % P;
    for (long i = 0; i < d; i++) values[i * P] = v[i];
}

// x [head_dim] as codes; returns their scale, NaN where a number is not finite.
float quantize(const float* x, long head_dim, Code* codes) {
    vec::F most = vec::zero(), nothing = vec::zero();
    for (long i = 0; i < head_dim; i += vec::LANES) {
        vec::F v = vec::load(x + i);
        most = vec::max(most, vec::max(v, vec::sub(vec::zero(), v)));
        nothing = vec::add(nothing, vec::mul(v, vec::zero()));  // NaN for infinity and NaN
    }
    float scale = vec::max_lane(most) / Code::MOST + vec::sum(nothing);
    bool usable = scale >= 0x1p-126f;  // so that its inverse is finite
    vec::F inverse = vec::set(usable ? 1 / scale : 0);
    for (long i = 0; i < head_dim; i += vec::LANES) {
        int16_t q[vec::LANES] = {};
        if (usable) vec::store(q, vec::round_to_int(vec::mul(vec::load(x + i), inverse)));
        for (int j = 0; j < vec::LANES; j++) codes[i + j].byte = uint8_t(q[j] + Code::ZERO);
    }
    return scale;
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

// In int8, the key relative to `origin`.
template <class E>
void store(const PagedKV& kv, int64_t slot, int head, const E* k, const E* v, const Origin* origin) {
    long d = kv.head_dim, at = slot % CHUNK;
    char* keys = chunk_at<Code>(kv, kv.k, slot / kv.block_size, head, slot % kv.block_size);
    char* values = chunk_at<Code>(kv, kv.v, slot / kv.block_size, head, slot % kv.block_size);
    float x[MAX_HEAD_DIM];
    Code codes[MAX_HEAD_DIM];
    transformed(k, d, x);
    for (long i = 0; i < d; i++) x[i] -= origin->scale * (int(origin->codes[i].byte) - Code::ZERO);
    chunk_scales(keys, d)[at] = quantize(x, d, codes);
    for (long i = 0; i < d; i++) ((Code*)keys)[(i / 4 * CHUNK + at) * 4 + byte_in_word(i)] = codes[i];
    widened(v, d, x);
    chunk_scales(values, d)[at] = quantize(x, d, codes);
    for (long i = 0; i < d; i++) ((Code*)values)[(at / 4 * d + i) * 4 + byte_in_word(at)] = codes[i];
}

Angles angles_of(const RopeAndStoreCall& c, long token) {
    const float* row = c.cos_sin + c.step->positions[token] * c.rotary_dim;
    return {row, row + c.rotary_dim / 2, c.rotary_dim / 2};
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
            origin->scale = quantize(x, d, origin->codes);
        }
    }
}

// The first block of a token's sequence.
long first_block(const Step& step, long token) {
    long seq = std::upper_bound(step.cu_seqlens, step.cu_seqlens + step.num_seqs, token) - step.cu_seqlens - 1;
    return step.block_tables[seq * step.max_blocks];
}

template <class E, class Stored>
void rope_and_store(const RopeAndStoreCall& c) {
    const PagedKV& kv = *c.kv;
    const Step& step = *c.step;
    long d = kv.head_dim, heads = kv.num_heads + kv.num_kv_heads;
    long grain = std::max(1L, GRAIN_ELEMENTS / (heads * d));
    if constexpr (SCALED<Stored>) store_origins<E>(c);
    parallel_for(c.threads, step.num_tokens, grain, [&](long t, int) {
        Angles angles = angles_of(c, t);
        const E *q = (const E*)c.q + t * c.q_stride, *k = (const E*)c.k + t * c.k_stride;
        const E* v = (const E*)c.v + t * c.v_stride;
        for (int h = 0; h < kv.num_heads; h++)
            rotate(q + h * d, angles, d, (E*)c.q_out + (t * kv.num_heads + h) * d);
        for (int h = 0; h < kv.num_kv_heads; h++) {
            E* rotated = (E*)c.k_out + (t * kv.num_kv_heads + h) * d;
            rotate(k + h * d, angles, d, rotated);
            if constexpr (SCALED<Stored>)
                store(kv, step.slots[t], h, rotated, v + h * d, origin_of(kv, first_block(step, t), h));
            else
                store(kv, step.slots[t], h, rotated, v + h * d);
        }
    });
}
}  // namespace

EXPORT int blade_rope_and_store(const RopeAndStoreCall* call) {
    bool coded = call->kv->storage == INT8;
    if (call->kv->dtype == FLOAT32)
        coded ? rope_and_store<float, Code>(*call) : rope_and_store<float, float>(*call);
    else
        coded ? rope_and_store<bf16, Code>(*call) : rope_and_store<bf16, bf16>(*call);
    return OK;
}
