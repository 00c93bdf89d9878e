// Which instruction sets this machine has. The portable library is safe to load anywhere, so it is the one to ask.
#include "api.h"

// 4: AVX-512 with BF16 and VNNI, 3: AVX-512 with VNNI, 2: AVX-512, 1: AVX2 with FMA, 0: none of them.
EXPORT int blade_machine_level(void) {
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512cd");
    if (!avx512 || !__builtin_cpu_supports("avx512vnni")) return avx512 ? 2 : avx2 ? 1 : 0;
    return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
#else
    return 0;
#endif
}

// The fastest of these levels. Intel's cores multiply bf16 pairs at half the rate of floats (measured on an Emerald Rapids:
// 225 against 429 GFLOP/s), for that is AMX's work there; AMD's at twice that rate.
EXPORT int blade_best_level(void) {
    int level = blade_machine_level();
#if defined(__x86_64__)
    if (level == 4 && __builtin_cpu_is("intel")) return 3;
#endif
    return level;
}

// What the sources hashed to when this library was built: found in the file before it is loaded.
EXPORT const char blade_source_hash[] = BLADE_SOURCE_HASH;
