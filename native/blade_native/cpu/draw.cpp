// Draws a token from each row of logits after temperature, top_k, top_p and min_p, in that order, without sorting the
// vocabulary. Logits become weights e^((x - peak) / temperature), whose largest is 1. Each restriction keeps whatever
// weighs as much as the last token that it has to keep, so each is a least weight; what is left is drawn from in the
// order of ids, by inverse transform. Tiles of 64 logits with their peaks and sums tell what need not be looked at.
#include <algorithm>
#include <cmath>
#include <limits>

#include "api.h"
#include "parallel.h"
#include "peaks.h"
#include "vec.h"

namespace {
constexpr long BUCKETS = 2048;
constexpr float LEAST = 1e-37f;   // what weighs less is never drawn
constexpr float VANISHING = -40;  // the logarithm of a weight that changes no sum of doubles with a 1 in it

struct Tile {
    float peak, sum;  // of the weights that are kept
};

uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

struct Row {
    const float* weights;
    long n;
    Tile* tiles;
    float* found;  // [n + 1]
    long num_tiles() const { return (n + TILE - 1) / TILE; }

    double total() const {
        double sum = 0;
        for (long t = 0; t < num_tiles(); t++) sum += tiles[t].sum;
        return sum;
    }

    // Finds all weights of at least `least`, in no time that depends on which they are. Returns how many.
    long find(float least) const {
        long num = 0;
        for (long t = 0; t < num_tiles(); t++) {
            if (tiles[t].peak < least) continue;
            for (long i = t * TILE, end = std::min(i + TILE, n); i < end; i++) {
                found[num] = weights[i];
                num += weights[i] >= least;
            }
        }
        return num;
    }

    // Keeps only weights of at least `least`.
    void keep(float least) {
        constexpr long PARTS = 16;
        for (long t = 0; t < num_tiles(); t++) {
            float sums[PARTS] = {}, sum = 0;
            if (tiles[t].peak >= least) {
                const float* w = weights + t * TILE;
                if ((t + 1) * TILE <= n) {
                    for (long i = 0; i < TILE; i += PARTS)
                        for (long j = 0; j < PARTS; j++) sums[j] += w[i + j] >= least ? w[i + j] : 0;
                } else {
                    for (long i = 0; t * TILE + i < n; i++) sums[i % PARTS] += w[i] >= least ? w[i] : 0;
                }
                for (float part : sums) sum += part;
            }
            tiles[t] = {sum > 0 ? tiles[t].peak : 0, sum};
        }
    }
};

// The least weight that is kept if weights of at least `least` are kept for as long as the amounts of all larger ones
// come to less than `limit`. By buckets of floats with the same first bits, and the order within the one where it ends.
template <class Amount>
float least_kept(const Row& row, float least, double limit, Amount amount) {
    const uint32_t low = bits_of(least), range = bits_of(1) - low;
    int shift = 0;
    while (range >> shift >= BUCKETS) shift++;
    auto bucket_of = [&](float weight) { return (bits_of(weight) - low) >> shift; };
    float* const found = row.found;
    const long num = row.find(least);
    double amounts[BUCKETS] = {};
    for (long i = 0; i < num; i++) amounts[bucket_of(found[i])] += amount(found[i]);
    double sum = 0;
    long bucket = BUCKETS - 1;
    while (bucket >= 0 && sum + amounts[bucket] < limit) sum += amounts[bucket--];
    if (bucket < 0) return least;

    float* const end = std::remove_if(found, found + num, [&](float x) { return bucket_of(x) != uint32_t(bucket); });
    std::sort(found, end, std::greater<float>());
    float last = found[0];
    for (const float* at = found; at < end; at++) {
        if (*at < last && sum >= limit) break;
        last = *at;
        sum += amount(*at);
    }
    return last;
}

// What is left after all restrictions: the least weight.
float restrict(Row& row, long top_k, double top_p, float min_p) {
    float least = LEAST;
    if (top_k < row.n) row.keep(least = least_kept(row, least, double(top_k), [](float) { return 1.0; }));
    if (top_p < 1) {
        double total = row.total();
        // All that weigh less than this come to less than what may be left out.
        float trifle = float((1 - top_p) * total / row.n);
        least = least_kept(row, std::max(least, trifle), top_p * total, [](float weight) { return double(weight); });
        row.keep(least);
    }
    if (min_p > least) row.keep(least = min_p);
    return least;
}

// The first index up to which the weights that are kept exceed the share u of their total.
long draw(const Row& row, float least, double u) {
    double target = u * row.total(), sum = 0;
    long t = 0, last_tile = 0, last = 0;
    for (; t < row.num_tiles() && sum + row.tiles[t].sum <= target; sum += row.tiles[t++].sum)
        if (row.tiles[t].sum > 0) last_tile = t;
    if (t == row.num_tiles()) t = last_tile, sum = -std::numeric_limits<double>::infinity();  // by a rounding
    for (long i = t * TILE, end = std::min(i + TILE, row.n); i < end && sum <= target; i++)
        if (row.weights[i] >= least) sum += row.weights[i], last = i;
    return last;
}

// The logit below which no tile need be weighed, where `peak` is the largest: nothing of it can be drawn. room [num_tiles].
float least_weighed(const Peak* peaks, long num_tiles, float peak, float temperature, long top_k, float* room) {
    float bar = peak + temperature * VANISHING;
    return top_k > num_tiles ? bar : std::max(bar, bar_of(peaks, num_tiles, top_k, room));
}

// Weights in the place of logits x[0 : n], n <= TILE, of which `peak` is the largest there is.
Tile weigh(float* x, long n, float peak, float temperature) {
    vec::F top = vec::set(peak), factor = vec::set(1 / temperature), sum = vec::zero(), most = vec::zero();
    vec::for_lanes(n, [&](long i, int lanes) {
        vec::F logit = vec::load_some(x + i, lanes);
        if (lanes < vec::LANES) logit = vec::keep(logit, 0, lanes, -__builtin_inff());
        vec::F weight = vec::exp(vec::mul(vec::sub(logit, top), factor));
        weight = vec::max(vec::zero(), vec::sub(weight, vec::set(2e-38f)));  // exp of -infinity is a little above 0
        vec::store_some(x + i, weight, lanes);
        sum = vec::add(sum, weight), most = vec::max(most, weight);
    });
    return {vec::max_lane(most), vec::sum(sum)};
}
}  // namespace

EXPORT int blade_draw(const DrawCall* call) {
    auto& c = *call;
    if (c.rows == 0) return OK;
    const long num_chunks = (c.n + CHUNK - 1) / CHUNK, num_tiles = (c.n + TILE - 1) / TILE;
    Scratch peaks_memory(c.rows * num_tiles * sizeof(Peak)), tiles_memory(c.rows * num_tiles * sizeof(Tile)),
        bars_memory(c.rows * sizeof(float)), rooms(c.threads * (c.n + 1) * sizeof(float));
    Peak* all_peaks = (Peak*)peaks_memory.data;
    Tile* all_tiles = (Tile*)tiles_memory.data;
    float* bars = (float*)bars_memory.data;
    if (!all_peaks || !all_tiles || !bars || !rooms.data) return OUT_OF_MEMORY;
    auto room_of = [&](int thread) { return (float*)rooms.data + thread * (c.n + 1); };
    auto is_drawn = [&](long row) { return c.temperatures[row] > 0 && std::isfinite(c.peaks[row]); };
    // body(row, tile, logits of the tile, their number)
    auto each_tile = [&](auto body) {
        parallel_parts(c.threads, c.rows * num_chunks, [&](long i, int) {
            long row = i / num_chunks, start = i % num_chunks * CHUNK, end = std::min(start + CHUNK, c.n);
            for (long at = start; at < end; at += TILE)
                body(row, row * num_tiles + at / TILE, c.logits + row * c.n + at, std::min(TILE, end - at));
        });
    };
    each_tile([&](long, long tile, float* x, long n) { all_peaks[tile] = find_peak(x, n); });
    parallel_for(c.threads, c.rows, 1, [&](long row, int thread) {
        const Peak* peaks = all_peaks + row * num_tiles;
        c.ids[row] = argmax(c.logits + row * c.n, c.n, TILE, peaks, c.peaks[row]);
        if (is_drawn(row))
            bars[row] = least_weighed(peaks, num_tiles, c.peaks[row], c.temperatures[row], c.top_k[row], room_of(thread));
    });
    each_tile([&](long row, long tile, float* x, long n) {
        if (!is_drawn(row)) return;
        bool matters = all_peaks[tile].value >= bars[row];
        all_tiles[tile] = matters ? weigh(x, n, c.peaks[row], c.temperatures[row]) : Tile{0, 0};
    });
    parallel_for(c.threads, c.rows, 1, [&](long i, int thread) {
        if (!is_drawn(i)) return;
        Row row{c.logits + i * c.n, c.n, all_tiles + i * num_tiles, room_of(thread)};
        c.ids[i] = draw(row, restrict(row, c.top_k[i], c.top_p[i], c.min_p[i]), c.u[i]);
    });
    return OK;
}
