// What the memory and the arithmetic units give, to hold the kernels against.
#include <algorithm>
#include <type_traits>

#include "amx_tile.h"
#include "api.h"
#include "linear_tile.h"
#include "parallel.h"
#include "vec.h"

constexpr long BLOCK = 64 * 1024;  // bytes
constexpr long RUN = 1024;         // of a block, before the next one has its turn
constexpr long PLACES = 3;         // read from side by side: a single stream does not use all of the bandwidth

// Reads `bytes` bytes of zeros (a multiple of BLOCK) on all threads. Returns OK, unless they are not zeros: so the
// loads cannot be optimised away.
EXPORT int blade_read(const char* data, int64_t bytes, int threads) {
    std::atomic<int> status{OK};
    Cut cut(threads, bytes / BLOCK, PLACES);
    parallel_parts(threads, cut.num_items(), [&](long item, int) {
        Strided blocks = cut.item(item);
        vec::F sums[4] = {vec::zero(), vec::zero(), vec::zero(), vec::zero()};
        for (long from = 0; from < BLOCK; from += RUN)
            for (long i = 0; i < blocks.num; i++) {
                const char* run = data + blocks.at(i) * BLOCK + from;
                for (const char* at = run; at < run + RUN; at += 256)
                    for (int j = 0; j < 4; j++) {
                        __builtin_prefetch(at + RUN + 64 * j, 0, 2);
                        sums[j] = vec::add(sums[j], vec::load((const float*)(at + 64 * j)));
                    }
            }
        for (int j = 0; j < 4; j++)
            if (vec::sum(sums[j]) != 0) status = -1;
    });
    return status;
}

namespace {
constexpr int CHAINS = 2 * TALL_TILE_ROWS;  // of sums that do not wait for each other

struct FloatDots {
    typedef vec::F Sum;
    static constexpr int PRODUCTS = 1;  // of a 32-bit word
    vec::W weights;
    vec::W activation;
    explicit FloatDots(const char* data) : weights(vec::word(data)), activation(vec::splat(data)) {}
    Sum start(const char* data) const { return vec::load((const float*)data); }
    Sum add(Sum c) const { return F32::dot(c, weights, activation); }
};
struct BF16Dots : FloatDots {
    static constexpr int PRODUCTS = 2;
    using FloatDots::FloatDots;
    Sum add(Sum c) const {
        if constexpr (WIDENS_BF16) return FloatDots::add(FloatDots::add(c));
        return BF16::dot(c, weights, activation);
    }
};
struct ByteDots {
    typedef vec::I Sum;
    static constexpr int PRODUCTS = 4;
    ByteDot<8>::Weights weights;
    const uint32_t* activation;
    explicit ByteDots(const char* data)
        : weights(ByteDot<8>::weights(vec::word(data))), activation((const uint32_t*)data) {}
    Sum start(const char* data) const { return vec::splat(data); }
    Sum add(Sum c) const { return ByteDot<8>::dot(c, weights, activation); }
};

template <class Dots>
int64_t multiply(const char* data, int64_t steps, int threads) {
    std::atomic<bool> zero{true};
    parallel_for(threads, threads, 1, [&](long, int) {
        Dots dots(data);
        typename Dots::Sum sums[CHAINS];
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++) sums[i] = dots.start(data + 4 * vec::LANES * i);
        for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 32
            for (int i = 0; i < CHAINS; i++) sums[i] = dots.add(sums[i]);
        vec::F all = vec::zero();
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++) {
            if constexpr (std::is_same_v<typename Dots::Sum, vec::F>)
                all = vec::add(all, sums[i]);
            else
                all = vec::add(all, vec::to_float(sums[i]));
        }
        if (vec::sum(all) != 0) zero = false;
    });
    return zero ? threads * steps * CHAINS * vec::LANES * Dots::PRODUCTS : -1;
}

#ifdef __AMX_TILE__
// The same in AMX's registers, four sums as the linears have them.
template <class Words>
int64_t multiply_tiles(const char* data, int64_t steps, int threads) {
    std::atomic<bool> zero{true};
    parallel_for(threads, threads, 1, [&](long, int) {
        const amx::InUse in_use;
        const int words = AMX_WORDS;
        alignas(64) uint32_t sums[AMX_ROWS * PANEL];
        amx::shape(AMX_ROWS, words);
        amx::load_sums<true>((const float*)data);
        amx::add_products<Words, true>((const uint32_t*)data, (const uint32_t*)data, words);
        for (int64_t step = 1; step < steps; step++) {
            Words::template dot<0, 4, 6>(), Words::template dot<1, 4, 7>();
            Words::template dot<2, 5, 6>(), Words::template dot<3, 5, 7>();
        }
        amx::store_sums<true>(sums);
        if (std::any_of(sums, sums + AMX_ROWS * PANEL, [](uint32_t sum) { return sum != 0; })) zero = false;
    });
    return zero ? threads * steps * AMX_ROWS * PANEL * AMX_WORDS * Words::PER_WORD : -1;
}
#endif
}  // namespace

// Multiplies and adds in registers on all threads: floats of 32 or 16 bits, or integers of 8, by what the linears multiply
// them with. `data` are 8 KiB of zeros. Returns how many products that were, -1 where `data` were not zeros.
EXPORT int64_t blade_multiply(const char* data, int bits, int64_t steps, int threads) {
#ifdef __AMX_TILE__
    if (bits == 8) return multiply_tiles<amx::Bytes>(data, steps, threads);
    if (bits == 16) return multiply_tiles<amx::Pairs>(data, steps, threads);
#endif
    if (bits == 8) return multiply<ByteDots>(data, steps, threads);
    return bits == 16 ? multiply<BF16Dots>(data, steps, threads) : multiply<FloatDots>(data, steps, threads);
}
