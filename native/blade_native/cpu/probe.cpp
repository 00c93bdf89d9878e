// What the memory gives, to hold the kernels against.
#include "api.h"
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
