// The largest of each row of logits, which is the token of greedy decoding, and the log-probabilities of the most likely
// ones, without sorting the vocabulary.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "parallel.h"
#include "peaks.h"
#include "vec.h"

namespace {
struct Candidate {
    float value;
    int64_t index;
    // Larger values first; of equal ones the lower index.
    bool operator<(const Candidate& other) const {
        return value > other.value || (value == other.value && index < other.index);
    }
};

// Of a row's chunk of logits: the largest, and the sum of all e^(logit - it).
struct Mass {
    Peak peak;
    float sum;
};

// `tiles`: the peak of each tile of the chunk.
Mass weigh(const float* x, long n, Peak* tiles) {
    Peak peak{-__builtin_inff(), 0};
    for (long at = 0; at < n; at += TILE) {
        Peak tile = tiles[at / TILE] = find_peak(x + at, std::min(TILE, n - at));
        peak.value = std::max(peak.value, tile.value), peak.spoilt += tile.spoilt;
    }
    vec::F top = vec::set(std::isfinite(peak.value) ? peak.value : 0), sum = vec::zero();
    vec::for_lanes(n, [&](long i, int lanes) {
        vec::F weight = vec::exp(vec::sub(vec::load_some(x + i, lanes), top));
        sum = vec::add(sum, lanes == vec::LANES ? weight : vec::keep(weight, 0, lanes, 0));
    });
    return {peak, vec::sum(sum)};
}

// The logarithm of the sum of a row's exponentials, from the masses of its chunks in order.
float log_sum(const Mass* masses, long num) {
    float peak = -__builtin_inff(), spoilt = 0;
    for (long i = 0; i < num; i++) peak = std::max(peak, masses[i].peak.value), spoilt += masses[i].peak.spoilt;
    double sum = 0;
    if (std::isfinite(peak))
        for (long i = 0; i < num; i++) sum += masses[i].sum * std::exp(double(masses[i].peak.value) - peak);
    return float(peak + std::log(sum)) + spoilt;
}

// The k largest of a row of n numbers, largest first, to best [k]. room [tiles].
void find_largest(const float* row, long n, const Peak* tiles, long k, float* room, Candidate* best) {
    const long num_tiles = (n + TILE - 1) / TILE;
    const float bar = k > num_tiles ? -__builtin_inff() : bar_of(tiles, num_tiles, k, room);
    long num = 0;  // in a heap, whose first is the one to go
    for (long i = 0; i < n; i++) {
        const Candidate candidate{row[i], i};
        if (i % TILE == 0 && tiles[i / TILE].value < bar) {
            i += TILE - 1;
        } else if (row[i] >= bar && (num < k || candidate < best[0])) {
            if (num == k) std::pop_heap(best, best + num--);
            best[num++] = candidate;
            std::push_heap(best, best + num);
        }
    }
    std::sort_heap(best, best + k);
}

// room: [k] candidates and [tiles] floats.
void report(const LogprobsCall& c, long row, const Peak* tiles, float log_sum, char* room) {
    float* logprobs = c.logprobs + row * c.k;
    int64_t* ids = c.ids + row * c.k;
    if (std::isfinite(log_sum)) {
        Candidate* best = (Candidate*)room;
        find_largest(c.logits + row * c.n, c.n, tiles, c.k, (float*)(best + c.k), best);
        for (long i = 0; i < c.k; i++) logprobs[i] = best[i].value - log_sum, ids[i] = best[i].index;
    } else {
        for (long i = 0; i < c.k; i++) logprobs[i] = __builtin_nanf(""), ids[i] = i;
    }
}
}  // namespace

EXPORT int blade_argmax(const ArgmaxCall* call) {
    auto& c = *call;
    if (c.rows == 0) return OK;
    long num_chunks = (c.n + CHUNK - 1) / CHUNK;
    Scratch scratch(c.rows * num_chunks * sizeof(Peak));
    Peak* peaks = (Peak*)scratch.data;
    if (!peaks) return OUT_OF_MEMORY;
    parallel_parts(c.threads, c.rows * num_chunks, [&](long i, int) {
        long from = i % num_chunks * CHUNK;
        peaks[i] = find_peak(c.logits + i / num_chunks * c.n + from, std::min(CHUNK, c.n - from));
    });
    for (long row = 0; row < c.rows; row++)
        c.ids[row] = argmax(c.logits + row * c.n, c.n, CHUNK, peaks + row * num_chunks, c.values[row]);
    return OK;
}

EXPORT int blade_logprobs(const LogprobsCall* call) {
    auto& c = *call;
    if (c.rows == 0) return OK;
    const long num_chunks = (c.n + CHUNK - 1) / CHUNK, num_tiles = (c.n + TILE - 1) / TILE;
    const long room_bytes = c.k * sizeof(Candidate) + (num_tiles + 1) / 2 * 2 * sizeof(float);
    Scratch masses_memory(c.rows * num_chunks * sizeof(Mass)), tiles_memory(c.rows * num_tiles * sizeof(Peak)),
        rooms(c.threads * room_bytes);
    Mass* masses = (Mass*)masses_memory.data;
    Peak* tiles = (Peak*)tiles_memory.data;
    if (!masses || !tiles || !rooms.data) return OUT_OF_MEMORY;
    parallel_parts(c.threads, c.rows * num_chunks, [&](long i, int) {
        long row = i / num_chunks, from = i % num_chunks * CHUNK;
        Peak* at = tiles + row * num_tiles + from / TILE;
        masses[i] = weigh(c.logits + row * c.n + from, std::min(CHUNK, c.n - from), at);
    });
    parallel_for(c.threads, c.rows, 1, [&](long row, int thread) {
        c.log_sums[row] = log_sum(masses + row * num_chunks, num_chunks);
        char* room = (char*)rooms.data + thread * room_bytes;
        if (c.k > 0) report(c, row, tiles + row * num_tiles, c.log_sums[row], room);
    });
    return OK;
}
