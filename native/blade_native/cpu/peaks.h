// The largest of a row of logits, by chunks, and whether any of them is unfit to choose by.
#pragma once
#include <algorithm>
#include <functional>

#include "vec.h"

constexpr long CHUNK = 4096;  // logits that a thread looks at together
constexpr long TILE = 64;     // of which a peak tells whether any of them need be looked at
static_assert(CHUNK % TILE == 0);

struct Peak {
    float value;
    float spoilt;  // 0, or NaN where there is NaN or +infinity
};

// max() gives its second operand where one is NaN.
inline Peak find_peak(const float* logits, long n) {
    vec::F most = vec::set(-__builtin_inff()), spoilt = vec::zero(), least = vec::set(-3e38f);
    auto add = [&](vec::F x) {
        most = vec::max(x, most);
        spoilt = vec::fma(vec::max(least, x), vec::zero(), spoilt);
    };
    vec::for_lanes(n, [&](long i, int lanes) {
        vec::F x = vec::load_some(logits + i, lanes);
        add(lanes == vec::LANES ? x : vec::keep(x, 0, lanes, -__builtin_inff()));
    });
    return {vec::max_lane(most), vec::sum(spoilt)};
}

// A bar that the k largest logits of a row reach, k <= num_parts: the k-th largest peak of its parts. room [num_parts].
inline float bar_of(const Peak* peaks, long num_parts, long k, float* room) {
    for (long i = 0; i < num_parts; i++) room[i] = peaks[i].value;
    std::nth_element(room, room + k - 1, room + num_parts, std::greater<float>());
    return room[k - 1];
}

// The index of the first of the largest of a row of n logits, from the peaks of its parts of `size` logits, and its value:
// NaN where there is NaN or +infinity.
inline int64_t argmax(const float* row, long n, long size, const Peak* peaks, float& value) {
    long best = 0, num_parts = (n + size - 1) / size;
    float spoilt = peaks[0].spoilt;
    for (long i = 1; i < num_parts; i++) {
        if (peaks[i].value > peaks[best].value) best = i;
        spoilt += peaks[i].spoilt;
    }
    value = peaks[best].value + spoilt;
    const float *from = row + best * size, *to = std::min(from + size, row + n);
    const float* at = std::find(from, to, peaks[best].value);
    return at < to ? at - row : 0;
}
