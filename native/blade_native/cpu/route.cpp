// The router of a mixture of experts (Shazeer et al. 2017): which experts a token goes to, and with what weights.
#include <algorithm>

#include "api.h"
#include "parallel.h"
#include "vec.h"

namespace {
constexpr long GRAIN_NUMBERS = 16 * 1024;  // that are compared: less is not worth another thread
constexpr float INF = __builtin_inff();

long padded(long n) { return (n + vec::LANES - 1) / vec::LANES * vec::LANES; }

// logits [n] -> keys [padded n] to choose by: NaN counts as -infinity, and what is NaN there is never chosen.
template <class E>
void make_keys(const E* logits, long n, float* keys) {
    vec::for_lanes(n, [&](long i, int lanes) {
        vec::F x = vec::max(vec::load_some(logits + i, lanes), vec::set(-INF));
        vec::store(keys + i, lanes == vec::LANES ? x : vec::keep(x, 0, lanes, __builtin_nanf("")));
    });
}

float largest(const float* keys, long n) {
    vec::F most = vec::set(-INF);
    for (long i = 0; i < n; i += vec::LANES) most = vec::max(vec::load(keys + i), most);
    return vec::max_lane(most);
}

// Sum of e^(x - peak); NaN where there is NaN or +infinity, or nothing but -infinity.
template <class E>
float sum_exp(const E* logits, long n, float peak) {
    vec::F total = vec::zero();
    vec::for_lanes(n, [&](long i, int lanes) {
        vec::F x = vec::exp(vec::sub(vec::load_some(logits + i, lanes), vec::set(peak)));
        total = vec::add(total, lanes == vec::LANES ? x : vec::keep(x, 0, lanes, 0.0f));
    });
    return vec::sum(total);
}

// values [k] -> their shares e^(x - peak) / total, or their sigmoids; with `normalize` divided by their own sum.
// total: as sum_exp gives it.
void weigh(const float* values, long k, float peak, float total, bool sigmoid, bool normalize, float* weights) {
    float own = 0;
    vec::for_lanes(k, [&](long i, int lanes) {
        vec::F x = vec::load_some(values + i, lanes);
        x = sigmoid ? vec::sigmoid(x) : vec::exp(vec::sub(x, vec::set(peak)));
        vec::store_some(weights + i, x, lanes);
    });
    for (long i = 0; i < k; i++) {
        if (values[i] == -INF) weights[i] = 0;
        own += weights[i];
    }
    float divisor = total != total ? total : normalize ? own : sigmoid ? 1.0f : total;
    for (long i = 0; i < k; i++) weights[i] /= divisor;
}

template <class E>
void route_row(const RouteCall& c, long row, float* keys, float* values) {
    const E* logits = (const E*)c.logits + row * c.n;
    make_keys(logits, c.n, keys);
    for (long i = 0; i < c.k; i++) {
        values[i] = largest(keys, padded(c.n));
        float* at = std::find(keys, keys + c.n, values[i]);
        *at = __builtin_nanf("");
        c.ids[row * c.k + i] = at - keys;
    }
    float total = sum_exp(logits, c.n, values[0]);
    weigh(values, c.k, values[0], total, c.sigmoid, c.normalize, c.weights + row * c.k);
}
}  // namespace

EXPORT int blade_route(const RouteCall* call) {
    auto& c = *call;
    long per_thread = padded(c.n) + padded(c.k);
    Scratch scratch(c.threads * per_thread * sizeof(float));
    if (!scratch.data) return OUT_OF_MEMORY;
    parallel_for(c.threads, c.rows, std::max(1L, long(GRAIN_NUMBERS / (c.n * c.k))), [&](long row, int thread) {
        float* keys = (float*)scratch.data + thread * per_thread;
        with_dtype(c.dtype, [&](auto e) { route_row<decltype(e)>(c, row, keys, keys + padded(c.n)); });
    });
    return OK;
}
