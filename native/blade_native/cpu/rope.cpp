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
void rope_and_store(const PagedKV& kv, const E* q, const E* k, const E* v, int64_t q_stride, int64_t k_stride,
                    int64_t v_stride, long num_tokens, const int64_t* positions, const int64_t* slots,
                    const float* cos_sin, long rotary_dim, E* q_out, E* k_out, int threads) {
    long d = kv.head_dim, heads = kv.num_heads + kv.num_kv_heads;
    long grain = std::max(1L, GRAIN_ELEMENTS / (heads * d));
    parallel_for(threads, num_tokens, grain, [=, &kv](long t, int) {
        const float* row = cos_sin + positions[t] * rotary_dim;
        Angles angles{row, row + rotary_dim / 2, rotary_dim / 2};
        for (int h = 0; h < kv.num_heads; h++)
            rotate(q + t * q_stride + h * d, angles, d, q_out + (t * kv.num_heads + h) * d);
        for (int h = 0; h < kv.num_kv_heads; h++) {
            E* rotated = k_out + (t * kv.num_kv_heads + h) * d;
            rotate(k + t * k_stride + h * d, angles, d, rotated);
            store(kv, slots[t], h, rotated, v + t * v_stride + h * d);
        }
    });
}
}  // namespace

// q [T, H, D], k and v [T, KV, D] with strides between tokens in elements; cos_sin [max_context, rotary_dim], cosines
// in the first half of a row and sines in the second; q_out and k_out are contiguous.
EXPORT int blade_rope_and_store(const PagedKV* kv, const void* q, const void* k, const void* v, int64_t q_stride,
                                int64_t k_stride, int64_t v_stride, int64_t num_tokens, const int64_t* positions,
                                const int64_t* slots, const float* cos_sin, int64_t rotary_dim, void* q_out,
                                void* k_out, int threads) {
    if (kv->dtype == FLOAT32)
        rope_and_store(*kv, (const float*)q, (const float*)k, (const float*)v, q_stride, k_stride, v_stride, num_tokens,
                       positions, slots, cos_sin, rotary_dim, (float*)q_out, (float*)k_out, threads);
    else
        rope_and_store(*kv, (const bf16*)q, (const bf16*)k, (const bf16*)v, q_stride, k_stride, v_stride, num_tokens,
                       positions, slots, cos_sin, rotary_dim, (bf16*)q_out, (bf16*)k_out, threads);
    return OK;
}
