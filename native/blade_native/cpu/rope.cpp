// Rotary position embedding (Su et al. 2021; halves of the rotary part pair up, as in GPT-NeoX) fused with the store of
// K and V into the paged cache.
#include <algorithm>

#include "api.h"
#include "parallel.h"
#include "vec.h"

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

// The layouts are described at PagedKV.
template <class E>
void store(const PagedKV& kv, int64_t slot, int head, const E* k, const E* v) {
    constexpr long P = 4 / sizeof(E);
    long d = kv.head_dim, offset = slot % kv.block_size;
    long start = (slot / kv.block_size * kv.num_kv_heads + head) * kv.block_size * d;
    uint32_t* keys = (uint32_t*)((E*)kv.k + start + offset / 16 * 16 * d) + offset % 16;
    for (long i = 0; i < d / P; i++) memcpy(keys + i * 16, k + i * P, 4);
    E* values = (E*)kv.v + start + offset / P * P * d + offset % P;
    for (long i = 0; i < d; i++) values[i * P] = v[i];
}

template <class E>
void rope_and_store(const RopeAndStoreCall& c) {
    const PagedKV& kv = *c.kv;
    const Step& step = *c.step;
    long d = kv.head_dim, heads = kv.num_heads + kv.num_kv_heads;
    long grain = std::max(1L, GRAIN_ELEMENTS / (heads * d));
    parallel_for(c.threads, step.num_tokens, grain, [&](long t, int) {
        const float* row = c.cos_sin + step.positions[t] * c.rotary_dim;
        Angles angles{row, row + c.rotary_dim / 2, c.rotary_dim / 2};
        const E *q = (const E*)c.q + t * c.q_stride, *k = (const E*)c.k + t * c.k_stride;
        const E* v = (const E*)c.v + t * c.v_stride;
        for (int h = 0; h < kv.num_heads; h++)
            rotate(q + h * d, angles, d, (E*)c.q_out + (t * kv.num_heads + h) * d);
        for (int h = 0; h < kv.num_kv_heads; h++) {
            E* rotated = (E*)c.k_out + (t * kv.num_kv_heads + h) * d;
            rotate(k + h * d, angles, d, rotated);
            store(kv, step.slots[t], h, rotated, v + h * d);
        }
    });
}
}  // namespace

EXPORT int blade_rope_and_store(const RopeAndStoreCall* call) {
    if (call->kv->dtype == FLOAT32)
        rope_and_store<float>(*call);
    else
        rope_and_store<bf16>(*call);
    return OK;
}
