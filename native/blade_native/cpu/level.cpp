// Which instruction sets this machine has. The portable library is safe to load anywhere, so it is the one to ask.
#include "api.h"
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {
// Whether tile registers may be used: the processor multiplies bytes and bf16 with them, the system saves them, and this
// process has got its leave to use them, as Linux wants to be asked once, for all threads, before the first one does.
__attribute__((target("xsave"))) bool may_use_tiles() {
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25, ALL = BF16 | TILE | INT8;
    constexpr unsigned long long SAVED = 3ull << 17;  // the state components of shapes and of what registers hold
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & ALL) != ALL) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || (_xgetbv(0) & SAVED) != SAVED) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
}  // namespace
#else
static bool may_use_tiles() { return false; }
#endif

// 5: AMX beside all of the others, 4: AVX-512 with BF16 and VNNI, 3: AVX-512 with VNNI, 2: AVX-512, 1: AVX2 with FMA, 0: none of
// them.
EXPORT int blade_machine_level(void) {
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512cd");
    if (!avx512 || !__builtin_cpu_supports("avx512vnni")) return avx512 ? 2 : avx2 ? 1 : 0;
    if (!__builtin_cpu_supports("avx512bf16")) return 3;
    return may_use_tiles() ? 5 : 4;
#else
    return 0;
#endif
}

// Greater for a faster level. Intel's cores multiply bf16 pairs at half the rate of floats (measured on an Emerald Rapids: 225
// against 429 GFLOP/s), for that is AMX's work there; AMD's at twice that rate.
EXPORT int blade_level_rank(int level) {
#if defined(__x86_64__)
    if (level == 4 && __builtin_cpu_is("intel")) return 2 * 3 - 1;
#endif
    return 2 * level;
}

// What the sources hashed to when this library was built: found in the file before it is loaded.
EXPORT const char blade_source_hash[] = BLADE_SOURCE_HASH;
