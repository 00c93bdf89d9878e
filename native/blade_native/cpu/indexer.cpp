// Which keys a query is to see where attention cannot see all (Qwen4-Exp): a small key for each group of tokens, kept beside
// the cache, is compared with small queries, and the groups that fit best are seen. A row's choice depends neither on the
// batch around it nor on the number of threads.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "parallel.h"
#include "vec.h"

namespace {
constexpr long MAX_SCORES = 1 << 21;  // of a run of queries that are scored together
constexpr long RUN = 256;             // groups that a thread scores at a time

// Where the tokens of one sequence lie.
struct Places {
    const int32_t* blocks;
    long block_size;

    Places(const Step& step, long token, long block_size) : block_size(block_size) {
        long seq = std::upper_bound(step.cu_seqlens, step.cu_seqlens + step.num_seqs, token) - step.cu_seqlens - 1;
        blocks = step.block_tables + seq * step.max_blocks;
    }
    long slot(long position) const { return blocks[position / block_size] * block_size + position % block_size; }
};

// x [d] by the angles of a row of cos_sin: halves of its first rotary_dim channels pair up.
void turn(float* x, const float* row, long rotary_dim) {
    const long half = rotary_dim / 2;
    for (long i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * row[i] - b * row[half + i];
        x[half + i] = b * row[i] + a * row[half + i];
    }
}

template <class E>
float rounded(float x) {
    E e;
    vec::from_float(x, e);
    return vec::to_float(e);
}

// The key of the group that ends at `position`, rounded after each step as the device's dtype has it. x [d]: room.
template <class E>
void keep_group(const KeepIndexKeysCall& c, const Places& places, long position, float* x) {
    const long first = position - c.group + 1;
    std::fill_n(x, c.d, 0.0f);
    for (long i = first; i <= position; i++) {
        const E* k = (const E*)c.kept + places.slot(i) * c.d;
        for (long j = 0; j < c.d; j++) x[j] += vec::to_float(k[j]);
    }
    float squares = 0;
    for (long j = 0; j < c.d; j++) x[j] = rounded<E>(x[j] / float(c.group)), squares += x[j] * x[j];
    const float factor = 1 / std::sqrt(squares / float(c.d) + c.eps);
    for (long j = 0; j < c.d; j++) x[j] = rounded<E>(x[j] * factor * vec::to_float(((const E*)c.weight)[j]));
    turn(x, c.cos_sin + first * c.rotary_dim, c.rotary_dim);
    E* to = (E*)c.kept + places.slot(position) * c.d;
    for (long j = 0; j < c.d; j++) vec::from_float(x[j], to[j]);
}

template <class E>
int keep_index_keys(const KeepIndexKeysCall& c) {
    const Step& step = *c.step;
    Scratch rooms(c.threads * c.d * sizeof(float));
    if (!rooms.data) return OUT_OF_MEMORY;
    for (long t = 0; t < step.num_tokens; t++)
        if (step.slots[t] >= 0) memcpy((E*)c.kept + step.slots[t] * c.d, (const E*)c.k + t * c.k_stride, c.d * sizeof(E));
    parallel_for(c.threads, step.num_tokens, 16, [&](long t, int thread) {
        const long position = step.positions[t];
        if (step.slots[t] >= 0 && position % c.group == c.group - 1)
            keep_group<E>(c, {step, t, c.block_size}, position, (float*)rooms.data + thread * c.d);
    });
    return OK;
}

// A query's scores of groups [from, to). q [num_heads, d], turned.
template <class E>
void score(const SelectKeysCall& c, const Places& places, const float* q, long from, long to, float* scores) {
    for (long g = from; g < to; g++) {
        const E* key = (const E*)c.kept + places.slot(g * c.group + c.group - 1) * c.d;
        float sum = 0;
        for (long h = 0; h < c.num_heads; h++) {
            vec::F dot = vec::zero();
            for (long i = 0; i < c.d; i += vec::LANES)
                dot = vec::fma(vec::load(q + h * c.d + i), vec::load(key + i), dot);
            const float fit = vec::sum(dot);
            sum += fit > 0 ? fit : 0;  // not so for NaN
        }
        scores[g] = sum;
    }
}

// The slots of the query at `position`, of whose `num` groups there are scores. room [num].
void select(const SelectKeysCall& c, const Places& places, long position, long num, const float* scores, float* room,
            int32_t* slots) {
    const long most = c.budget / c.group;
    float bar = -1;
    long equal = num;  // how many that reach the bar, and no more, are seen
    if (num > most) {
        std::copy_n(scores, num, room);
        std::nth_element(room, room + most - 1, room + num, [](float a, float b) { return a > b; });
        bar = room[most - 1];
        equal = most - std::count_if(scores, scores + num, [&](float x) { return x > bar; });
    }
    int32_t *at = slots, *end = slots + c.budget + c.group - 1;
    for (long g = 0; g < num; g++) {
        if (scores[g] < bar || (scores[g] == bar && equal-- <= 0)) continue;
        for (long i = 0; i < c.group; i++) *at++ = int32_t(places.slot(g * c.group + i));
    }
    for (long i = num * c.group; i <= position; i++) *at++ = int32_t(places.slot(i));
    std::fill(at, end, -1);
}

template <class E>
int select_keys(const SelectKeysCall& c) {
    const Step& step = *c.step;
    const auto count = [&](long t) { return (step.positions[t] + 1) / c.group; };
    const long width = c.num_heads * c.d, most = c.budget / c.group;
    for (long first = 0, end, row; first < step.num_tokens; first = end) {
        row = 1;  // groups of the longest of the run's contexts
        for (end = first; end < step.num_tokens; end++) {
            const long longest = std::max(row, count(end));
            if (end > first && longest * (end + 1 - first) > MAX_SCORES) break;
            row = longest;
        }
        const long num = end - first, runs = (row + RUN - 1) / RUN;
        Scratch queries(num * width * sizeof(float)), scores(num * row * sizeof(float)), rooms(c.threads * row * sizeof(float));
        if (!queries.data || !scores.data || !rooms.data) return OUT_OF_MEMORY;
        parallel_for(c.threads, num, 16, [&](long i, int) {
            float* q = (float*)queries.data + i * width;
            for (long j = 0; j < width; j++) q[j] = vec::to_float(((const E*)c.q)[(first + i) * c.q_stride + j]);
            for (long h = 0; h < c.num_heads; h++) {
                turn(q + h * c.d, c.cos_sin + step.positions[first + i] * c.rotary_dim, c.rotary_dim);
                for (long j = 0; j < c.d; j++) q[h * c.d + j] = rounded<E>(q[h * c.d + j]);
            }
        });
        parallel_for(c.threads, num * runs, 1, [&](long i, int) {
            const long t = first + i / runs, from = i % runs * RUN, to = std::min(from + RUN, count(t));
            if (count(t) <= most || from >= to) return;  // all are seen, whatever their scores
            score<E>(c, {step, t, c.block_size}, (const float*)queries.data + i / runs * width, from, to,
                     (float*)scores.data + i / runs * row);
        });
        parallel_for(c.threads, num, 1, [&](long i, int thread) {
            const long t = first + i;
            float *own = (float*)scores.data + i * row, *room = (float*)rooms.data + thread * row;
            if (count(t) <= most) std::fill_n(own, count(t), 0.0f);
            select(c, {step, t, c.block_size}, step.positions[t], count(t), own, room,
                   c.slots + t * (c.budget + c.group - 1));
        });
    }
    return OK;
}
}  // namespace

EXPORT int blade_keep_index_keys(const KeepIndexKeysCall* call) {
    return call->dtype == FLOAT32 ? keep_index_keys<float>(*call) : keep_index_keys<bf16>(*call);
}

EXPORT int blade_select_keys(const SelectKeysCall* call) {
    return call->dtype == FLOAT32 ? select_keys<float>(*call) : select_keys<bf16>(*call);
}
