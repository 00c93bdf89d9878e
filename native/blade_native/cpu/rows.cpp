// What works row by row: root mean square norms (Zhang & Sennrich 2019) and the gate of a gated MLP (Shazeer 2020).
// Sums and exponentials are float32 whatever the dtype.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "parallel.h"
#include "vec.h"

namespace {
constexpr long GRAIN_ELEMENTS = 8 * 1024;  // of a row op: less is not worth another thread

long grain(long d) { return std::max(1L, GRAIN_ELEMENTS / d); }

template <class E>
float inverse_rms(const E* x, long d, float eps) {
    vec::F squares = vec::zero();
    vec::for_lanes(d, [&](long i, int lanes) {
        vec::F v = vec::load_some(x + i, lanes);
        squares = vec::fma(v, v, squares);
    });
    return 1.0f / sqrtf(vec::sum(squares) / float(d) + eps);
}

template <class E>
void scale_row(const E* x, const E* weight, long d, float scale, E* y) {
    vec::for_lanes(d, [&](long i, int lanes) {
        vec::F v = vec::mul(vec::load_some(x + i, lanes), vec::set(scale));
        vec::store_some(y + i, vec::mul(v, vec::load_some(weight + i, lanes)), lanes);
    });
}

// Rows of x: `inner` contiguous ones every `stride` elements.
template <class E>
void rms_norm(const E* x, long outer, long inner, long stride, long d, const E* weight, float eps, E* y, int threads) {
    parallel_for(threads, outer * inner, grain(d), [=](long row, int) {
        const E* in = x + row / inner * stride + row % inner * d;
        scale_row(in, weight, d, inverse_rms(in, d, eps), y + row * d);
    });
}

template <class E>
void add_rms_norm(const E* x, E* residual, long rows, long d, const E* weight, float eps, E* y, int threads) {
    parallel_for(threads, rows, grain(d), [=](long row, int) {
        E* sum = residual + row * d;
        vec::for_lanes(d, [&](long i, int lanes) {
            vec::F v = vec::add(vec::load_some(x + row * d + i, lanes), vec::load_some(sum + i, lanes));
            vec::store_some(sum + i, v, lanes);
        });
        scale_row(sum, weight, d, inverse_rms(sum, d, eps), y + row * d);
    });
}

template <class E>
void silu_mul(const E* gate_up, long rows, long d, E* y, int threads) {
    parallel_for(threads, rows, grain(2 * d), [=](long row, int) {
        const E *gates = gate_up + row * 2 * d, *ups = gates + d;
        vec::for_lanes(d, [&](long i, int lanes) {
            vec::F gate = vec::load_some(gates + i, lanes), up = vec::load_some(ups + i, lanes);
            vec::F denominator = vec::add(vec::set(1.0f), vec::exp(vec::sub(vec::zero(), gate)));
            vec::store_some(y + row * d + i, vec::mul(vec::div(gate, denominator), up), lanes);
        });
    });
}
}  // namespace

// x [outer, inner, d] with `stride` elements between outers -> y [outer, inner, d] contiguous.
EXPORT int blade_rms_norm(int dtype, const void* x, int64_t outer, int64_t inner, int64_t stride, int64_t d,
                          const void* weight, float eps, void* y, int threads) {
    if (dtype == FLOAT32)
        rms_norm((const float*)x, outer, inner, stride, d, (const float*)weight, eps, (float*)y, threads);
    else
        rms_norm((const bf16*)x, outer, inner, stride, d, (const bf16*)weight, eps, (bf16*)y, threads);
    return OK;
}

// residual += x, in place; y = rms_norm(residual). All [rows, d].
EXPORT int blade_add_rms_norm(int dtype, const void* x, void* residual, int64_t rows, int64_t d, const void* weight,
                              float eps, void* y, int threads) {
    if (dtype == FLOAT32)
        add_rms_norm((const float*)x, (float*)residual, rows, d, (const float*)weight, eps, (float*)y, threads);
    else
        add_rms_norm((const bf16*)x, (bf16*)residual, rows, d, (const bf16*)weight, eps, (bf16*)y, threads);
    return OK;
}

// gate_up [rows, 2 d] -> y [rows, d].
EXPORT int blade_silu_mul(int dtype, const void* gate_up, int64_t rows, int64_t d, void* y, int threads) {
    if (dtype == FLOAT32)
        silu_mul((const float*)gate_up, rows, d, (float*)y, threads);
    else
        silu_mul((const bf16*)gate_up, rows, d, (bf16*)y, threads);
    return OK;
}
