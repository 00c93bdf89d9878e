// The largest of each row of logits: the token of greedy decoding, and the candidates of top-k sampling, without
// sorting the vocabulary.
#include <algorithm>

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

// The largest of the floor and sixteen logits; NaN counts for nothing.
float highest(const float* logits, float floor) { return vec::max_lane(vec::max(vec::load(logits), vec::set(floor))); }

// best[0 : 2 k] holds candidates; whenever it is full the worse half is dropped, which raises the bar to enter.
void top_k(const float* row, long n, long k, Candidate* best) {
    long num = 0;
    float bar = -__builtin_inff();
    for (long i = 0; i < n; i += vec::LANES) {
        int lanes = int(std::min<long>(n - i, vec::LANES));
        if (num >= k && lanes == vec::LANES && highest(row + i, bar) == bar) continue;
        for (int j = 0; j < lanes; j++) {
            if (num >= k && !(row[i + j] > bar)) continue;
            bool is_number = row[i + j] == row[i + j];
            best[num++] = {is_number ? row[i + j] : -__builtin_inff(), i + j};
            if (num == 2 * k) {
                std::nth_element(best, best + k - 1, best + num);
                num = k;
                bar = best[k - 1].value;
            }
        }
    }
    std::partial_sort(best, best + std::min(k, num), best + num);
}
}  // namespace

EXPORT int blade_argmax(const ArgmaxCall* call) {
    auto& c = *call;
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

EXPORT int blade_top_k(const TopKCall* call) {
    auto& c = *call;
    Scratch scratch(c.rows * 2 * c.k * sizeof(Candidate));
    Candidate* candidates = (Candidate*)scratch.data;
    if (!candidates) return OUT_OF_MEMORY;
    parallel_for(c.threads, c.rows, 1, [&](long row, int) {
        Candidate* best = candidates + row * 2 * c.k;
        top_k(c.logits + row * c.n, c.n, c.k, best);
        for (int64_t i = 0; i < c.k; i++) {
            c.values[row * c.k + i] = best[i].value;
            c.ids[row * c.k + i] = best[i].index;
        }
    });
    return OK;
}
