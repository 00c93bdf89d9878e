// What the recurrent layers of hybrid models do: short convolutions, and the gated delta rule (Yang, Kautz & Hatamizadeh
// 2024). Sequences, and within them channels, do not touch each other, so that each item of work takes some channels
// through all tokens of a sequence, with their state in the L1 cache. Each token is one step of the recurrence, so that
// results do not depend on how a prompt is cut into chunks.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "parallel.h"
#include "vec.h"

namespace {
constexpr int CHANNELS = 512;  // of a convolution, taken together: long runs of memory, and weights that fit L1
constexpr int COLUMNS = 32;   // of a head's state: [128][32] floats are half of a small L1

// Channels [c, c + n) of one sequence. Inputs before the sequence's first token are those kept in its state.
template <class E, int W>
void convolve(const ShortConvCall& call, long seq, long c, int n) {
    const Slots& s = *call.slots;
    const long start = s.cu_seqlens[seq], length = s.cu_seqlens[seq + 1] - start;
    float weights[W][CHANNELS] = {};
    E held[W - 1][CHANNELS] = {};
    for (int i = 0; i < n; i++)
        for (int j = 0; j < W; j++) weights[j][i] = vec::to_float(((const E*)call.weight)[(c + i) * W + j]);
    if (s.in[seq] >= 0) {
        const E* state = (const E*)call.state + (s.in[seq] * call.channels + c) * (W - 1);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < W - 1; j++) held[j][i] = state[i * (W - 1) + j];
    }
    auto input = [&](long t) {  // channels of token t >= 1 - W
        return t < 0 ? held[t + W - 1] : (const E*)call.x + (start + t) * call.x_stride + c;
    };
    for (long t = 0; t < length; t++) {
        E* y = (E*)call.y + (start + t) * call.channels + c;
        vec::for_lanes(n, [&](long i, int lanes) {
            vec::F sum = vec::zero();
            for (int j = 0; j < W; j++)
                sum = vec::fma(vec::load(weights[j] + i), vec::load_some(input(t + j - W + 1) + i, lanes), sum);
            vec::store_some(y + i, vec::silu(sum), lanes);
        });
    }
    if (s.out[seq] < 0) return;
    E* state = (E*)call.state + (s.out[seq] * call.channels + c) * (W - 1);
    for (int j = 0; j < W - 1; j++) {
        const E* last = input(length + j - W + 1);
        for (int i = 0; i < n; i++) state[i * (W - 1) + j] = last[i];
    }
}

template <class E, int W>
void short_conv(const ShortConvCall& call) {
    long num_parts = (call.channels + CHANNELS - 1) / CHANNELS;
    parallel_parts(call.threads, call.slots->num_seqs * num_parts, [&](long item, int) {
        long c = item % num_parts * CHANNELS;
        convolve<E, W>(call, item / num_parts, c, int(std::min<long>(CHANNELS, call.channels - c)));
    });
}

template <class E>
void short_conv(const ShortConvCall& call) {
    if (call.window == 2) return short_conv<E, 2>(call);
    if (call.window == 3) return short_conv<E, 3>(call);
    short_conv<E, 4>(call);
}

// x [d] -> scale * x / sqrt(sum of squares + 1e-6).
template <class E>
void bring_to_length(const E* x, long d, float scale, float* out) {
    vec::F squares = vec::zero();
    vec::for_lanes(d, [&](long i, int lanes) {
        vec::F v = vec::load_some(x + i, lanes);
        squares = vec::fma(v, v, squares);
    });
    vec::F factor = vec::set(scale / sqrtf(vec::sum(squares) + 1e-6f));
    vec::for_lanes(d, [&](long i, int lanes) {
        vec::store_some(out + i, vec::mul(vec::load_some(x + i, lanes), factor), lanes);
    });
}

float dot(const float* a, const float* b, long d) {
    vec::F sum = vec::zero();
    vec::for_lanes(d, [&](long i, int lanes) {
        sum = vec::fma(vec::load_some(a + i, lanes), vec::load_some(b + i, lanes), sum);
    });
    return vec::sum(sum);
}

float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// What one token does to a head's state, whatever the column.
struct Token {
    const float *q, *k;  // [dk], of length dk^-0.5 and 1
    float qk, alpha, beta;
};

// Some columns of a head's state.
struct State {
    float* at = nullptr;
    long stride = 0;        // from row to row
    bool streamed = false;  // written past the caches: nothing reads it before the next step of the model
};

// 16 NV columns: to = alpha * from + k (beta * (v - alpha * k^T from)), out = q^T to; `next` is fetched meanwhile.
template <int NV, class E>
void step(const Token& token, long dk, const E* v, State from, State to, E* out, State next) {
    vec::F read[NV], asked[NV], delta[NV];
    for (int n = 0; n < NV; n++) read[n] = asked[n] = vec::zero();
    for (long i = 0; i < dk; i++) {
        vec::F k = vec::set(token.k[i]), q = vec::set(token.q[i]);
        for (int n = 0; n < NV; n++) {
            vec::F s = vec::load(from.at + i * from.stride + n * vec::LANES);
            read[n] = vec::fma(k, s, read[n]);
            asked[n] = vec::fma(q, s, asked[n]);
            if (next.at) __builtin_prefetch(next.at + i * next.stride + n * vec::LANES, 0, 2);
        }
    }
    vec::F alpha = vec::set(token.alpha);
    for (int n = 0; n < NV; n++) {
        vec::F missing = vec::sub(vec::load(v + n * vec::LANES), vec::mul(alpha, read[n]));
        delta[n] = vec::mul(vec::set(token.beta), missing);
        vec::store(out + n * vec::LANES, vec::fma(vec::set(token.qk), delta[n], vec::mul(alpha, asked[n])));
    }
    auto update = [&](auto store) {
        for (long i = 0; i < dk; i++) {
            vec::F k = vec::set(token.k[i]);
            for (int n = 0; n < NV; n++) {
                vec::F s = vec::load(from.at + i * from.stride + n * vec::LANES);
                store(to.at + i * to.stride + n * vec::LANES, vec::fma(k, delta[n], vec::mul(alpha, s)));
            }
        }
    };
    if (to.streamed)
        update([](float* at, vec::F x) { vec::stream(at, x); });
    else
        update([](float* at, vec::F x) { vec::store(at, x); });
}

// One item of the gated delta rule: columns of one head over a sequence.
class Columns {
public:
    Columns(const GatedDeltaCall& call, long item) : c(call), s(*call.slots), parts((call.dv + COLUMNS - 1) / COLUMNS) {
        column = item % parts * COLUMNS;
        head = item / parts % c.hv;
        seq = item / parts / c.hv;
    }
    static long count(const GatedDeltaCall& c) { return c.slots->num_seqs * c.hv * ((c.dv + COLUMNS - 1) / COLUMNS); }

    // What the columns are before the sequence's first token, and where they go after its last; none where `at` is null.
    State source() const { return in_slot(s.in[seq], false); }
    State target() const { return in_slot(s.out[seq], uintptr_t(c.state) % 64 == 0); }

    // Scratch holds floats: {[dk] q, [dk] k, [dk][COLUMNS] state}.
    template <class E>
    void run(float* scratch, State next) const {
        const State local{scratch + 2 * c.dk, COLUMNS};
        long first = s.cu_seqlens[seq], last = s.cu_seqlens[seq + 1] - 1;
        State from = source();
        if (!from.at) {
            memset(local.at, 0, c.dk * COLUMNS * sizeof(float));
            from = local;
        }
        for (long t = first; t <= last; t++) {
            State to = t == last ? target() : local;
            if (!to.at) to = local;
            const E* v = (const E*)c.v + t * c.v_stride + head * c.dv + column;
            E* out = (E*)c.out + (t * c.hv + head) * c.dv + column;
            Token token = read<E>(t, scratch);
            if (c.dv - column >= COLUMNS)
                step<2>(token, c.dk, v, from, to, out, t == last ? next : State{});
            else
                step<1>(token, c.dk, v, from, to, out, t == last ? next : State{});
            from = local;
        }
    }

private:
    State in_slot(long slot, bool streamed) const {
        if (slot < 0) return {};
        return {c.state + (slot * c.hv + head) * c.dk * c.dv + column, c.dv, streamed};
    }

    template <class E>
    Token read(long t, float* scratch) const {
        long key_head = head / (c.hv / c.hk);
        float *q = scratch, *k = scratch + c.dk;
        bring_to_length((const E*)c.q + t * c.q_stride + key_head * c.dk, c.dk, 1 / sqrtf(float(c.dk)), q);
        bring_to_length((const E*)c.k + t * c.k_stride + key_head * c.dk, c.dk, 1, k);
        float a = vec::to_float(((const E*)c.a)[t * c.a_stride + head]);
        float b = vec::to_float(((const E*)c.b)[t * c.b_stride + head]);
        float alpha = expf(c.decay[head] * softplus(a + c.dt_bias[head]));
        return {q, k, dot(q, k, c.dk), alpha, 1 / (1 + expf(-b))};
    }

    const GatedDeltaCall& c;
    const Slots& s;
    long parts, seq, head, column;
};

template <class E>
void gated_delta(const GatedDeltaCall& c, float* scratch, long per_thread) {
    const long count = Columns::count(c);
    parallel_parts(c.threads, count, [&](long item, int thread) {
        State next = item + 1 < count ? Columns(c, item + 1).source() : State{};
        Columns(c, item).run<E>(scratch + thread * per_thread, next);
    });
}
}  // namespace

EXPORT int blade_short_conv(const ShortConvCall* call) {
    return with_dtype(call->dtype, [&](auto e) { short_conv<decltype(e)>(*call); }), OK;
}

EXPORT int blade_gated_delta(const GatedDeltaCall* call) {
    long per_thread = (call->dk * (2 + COLUMNS) + vec::LANES - 1) / vec::LANES * vec::LANES;
    Scratch scratch(call->threads * per_thread * sizeof(float));
    if (!scratch.data) return OUT_OF_MEMORY;
    return with_dtype(call->dtype, [&](auto e) { gated_delta<decltype(e)>(*call, (float*)scratch.data, per_thread); }), OK;
}
