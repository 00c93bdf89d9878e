// The largest of each row of logits: the token of greedy decoding, and the candidates of top-k sampling, without
// sorting the vocabulary.
#include <algorithm>

#include "api.h"
#include "parallel.h"
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

// NaN and +infinity leave their mark on `spoilt`, which else stays 0. max() gives its second operand where one is NaN.
int64_t argmax(const float* row, long n, float& value) {
    vec::F most = vec::set(-__builtin_inff()), spoilt = vec::zero(), least = vec::set(-3e38f);
    vec::for_lanes(n, [&](long i, int lanes) {
        vec::F x = vec::keep(vec::load_some(row + i, lanes), 0, lanes, -__builtin_inff());
        most = vec::max(x, most);
        spoilt = vec::fma(vec::max(least, x), vec::zero(), spoilt);
    });
    value = vec::max_lane(most);
    const float* at = std::find(row, row + n, value);
    value += vec::sum(spoilt);
    return at < row + n ? at - row : 0;
}

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
    parallel_for(c.threads, c.rows, 1, [&](long row, int) {
        c.ids[row] = argmax(c.logits + row * c.n, c.n, c.values[row]);
    });
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
