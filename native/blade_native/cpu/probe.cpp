// What the memory gives, to hold the kernels against.
#include "api.h"
#include "parallel.h"
#include "vec.h"

constexpr int64_t BLOCK = 64 * 1024;  // bytes

// Reads `bytes` bytes of zeros (a multiple of BLOCK) on all threads. Returns OK, unless they are not zeros: so the
// loads cannot be optimised away.
EXPORT int blade_read(const char* data, int64_t bytes, int threads) {
    std::atomic<int> status{OK};
    parallel_for(threads, bytes / BLOCK, 16, [&](long block, int) {
        vec::F sums[4] = {vec::zero(), vec::zero(), vec::zero(), vec::zero()};
        for (const char* at = data + block * BLOCK; at < data + (block + 1) * BLOCK; at += 256)
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch(at + 4096 + 64 * j, 0, 2);
                sums[j] = vec::add(sums[j], vec::load((const float*)(at + 64 * j)));
            }
        for (int j = 0; j < 4; j++)
            if (vec::sum(sums[j]) != 0) status = -1;
    });
    return status;
}
