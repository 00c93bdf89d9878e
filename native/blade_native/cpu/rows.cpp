// What works row by row: root mean square norms (Zhang & Sennrich 2019), gates, such as a gated MLP's (Shazeer 2020), rows
// taken out of a table, added to one, copied into one and scaled.
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

template <class E>
void rms_norm(const RmsNormCall& c) {
    parallel_for(c.threads, c.outer * c.inner, grain(c.d), [&](long row, int) {
        const E* in = (const E*)c.x + row / c.inner * c.stride + row % c.inner * c.d;
        scale_row(in, (const E*)c.weight, c.d, inverse_rms(in, c.d, c.eps), (E*)c.y + row * c.d);
    });
}

template <class E>
void add_rms_norm(const AddRmsNormCall& c) {
    parallel_for(c.threads, c.rows, grain(c.d), [&](long row, int) {
        const E* in = (const E*)c.x + row * c.d;
        E* sum = (E*)c.residual + row * c.d;
        vec::for_lanes(c.d, [&](long i, int lanes) {
            vec::F v = vec::add(vec::load_some(in + i, lanes), vec::load_some(sum + i, lanes));
            vec::store_some(sum + i, v, lanes);
        });
        scale_row(sum, (const E*)c.weight, c.d, inverse_rms(sum, c.d, c.eps), (E*)c.y + row * c.d);
    });
}

template <class E>
void gated_rms_norm(const GatedRmsNormCall& c) {
    parallel_for(c.threads, c.tokens * c.heads, grain(2 * c.d), [&](long row, int) {
        const E *x = (const E*)c.x + row * c.d, *weight = (const E*)c.weight;
        const E* gate = (const E*)c.gate + row / c.heads * c.gate_stride + row % c.heads * c.d;
        E* y = (E*)c.y + row * c.d;
        vec::F scale = vec::set(inverse_rms(x, c.d, c.eps));
        vec::for_lanes(c.d, [&](long i, int lanes) {
            vec::F normed = vec::mul(vec::mul(vec::load_some(x + i, lanes), scale), vec::load_some(weight + i, lanes));
            vec::store_some(y + i, vec::mul(normed, vec::silu(vec::load_some(gate + i, lanes))), lanes);
        });
    });
}

template <class E>
void silu_mul(const SiluMulCall& c) {
    parallel_for(c.threads, c.rows, grain(2 * c.d), [&](long row, int) {
        const E *gates = (const E*)c.gate_up + row * 2 * c.d, *ups = gates + c.d;
        E* y = (E*)c.y + row * c.d;
        vec::for_lanes(c.d, [&](long i, int lanes) {
            vec::F gate = vec::load_some(gates + i, lanes), up = vec::load_some(ups + i, lanes);
            vec::store_some(y + i, vec::mul(vec::silu(gate), up), lanes);
        });
    });
}

template <class E>
void add_rows(const AddRowsCall& c) {
    parallel_for(c.threads, c.num_rows, grain(c.d), [&](long i, int) {
        const E* x = (const E*)c.x + i * c.d;
        E* y = (E*)c.y + (c.rows ? c.rows[i] : i) * c.d;
        vec::for_lanes(c.d, [&](long j, int lanes) {
            vec::store_some(y + j, vec::add(vec::load_some(x + j, lanes), vec::load_some(y + j, lanes)), lanes);
        });
    });
}

template <class E>
void scale_rows(const ScaleRowsCall& c) {
    parallel_for(c.threads, c.rows, grain(c.d), [&](long row, int) {
        const E* x = (const E*)c.x + row * c.x_stride;
        E* y = (E*)c.y + row * c.d;
        vec::F factor = vec::set(c.factors[c.at[row]]);
        vec::for_lanes(c.d, [&](long i, int lanes) {
            vec::store_some(y + i, vec::mul(vec::load_some(x + i, lanes), factor), lanes);
        });
    });
}

template <class E>
void sigmoid_mul(const SigmoidMulCall& c) {
    parallel_for(c.threads, c.rows, grain(2 * c.d), [&](long row, int) {
        E* x = (E*)c.x + row * c.d;
        const E* gate = (const E*)c.gate + row * c.gate_stride;
        bool single = c.gate_width == 1;
        vec::F factor = vec::sigmoid(vec::set(vec::to_float(*gate)));
        vec::for_lanes(c.d, [&](long i, int lanes) {
            if (!single) factor = vec::sigmoid(vec::load_some(gate + i, lanes));
            vec::store_some(x + i, vec::mul(vec::load_some(x + i, lanes), factor), lanes);
        });
    });
}
}  // namespace

EXPORT int blade_add_rows(const AddRowsCall* call) {
    return with_dtype(call->dtype, [&](auto e) { add_rows<decltype(e)>(*call); }), OK;
}

EXPORT int blade_rms_norm(const RmsNormCall* call) {
    return with_dtype(call->dtype, [&](auto e) { rms_norm<decltype(e)>(*call); }), OK;
}

EXPORT int blade_add_rms_norm(const AddRmsNormCall* call) {
    return with_dtype(call->dtype, [&](auto e) { add_rms_norm<decltype(e)>(*call); }), OK;
}

EXPORT int blade_gated_rms_norm(const GatedRmsNormCall* call) {
    return with_dtype(call->dtype, [&](auto e) { gated_rms_norm<decltype(e)>(*call); }), OK;
}

EXPORT int blade_silu_mul(const SiluMulCall* call) {
    return with_dtype(call->dtype, [&](auto e) { silu_mul<decltype(e)>(*call); }), OK;
}

EXPORT int blade_sigmoid_mul(const SigmoidMulCall* call) {
    return with_dtype(call->dtype, [&](auto e) { sigmoid_mul<decltype(e)>(*call); }), OK;
}

EXPORT int blade_scale_rows(const ScaleRowsCall* call) {
    return with_dtype(call->dtype, [&](auto e) { scale_rows<decltype(e)>(*call); }), OK;
}

EXPORT int blade_take_rows(const TakeRowsCall* call) {
    auto& c = *call;
    parallel_for(c.threads, c.num_rows, grain(c.row_bytes / 2), [&](long i, int) {
        memcpy(c.out + i * c.row_bytes, c.table + c.rows[i] * c.row_bytes, c.row_bytes);
    });
    return OK;
}

EXPORT int blade_copy_rows(const CopyRowsCall* call) {
    auto& c = *call;
    parallel_for(c.threads, c.num_rows, grain(c.row_bytes / 2), [&](long i, int) {
        memcpy(c.out + i * c.out_stride, c.x + i * c.x_stride, c.row_bytes);
    });
    return OK;
}
