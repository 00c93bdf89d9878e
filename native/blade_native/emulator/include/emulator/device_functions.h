// Functions that CUDA has built in and C++ has not. The approximate ones are computed exactly.
#pragma once
#include "emulator/async_copy.h"

// ---- memory
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __nanosleep(unsigned) {}
[[noreturn]] static inline void __trap(EMULATOR_HERE) { emulator::fail("__trap at %s:%d", site.file, site.line); }

#define EMULATOR_LOAD(NAME)                                       \
  template <class T>                                              \
  static T NAME(const T* p, EMULATOR_HERE) {                      \
    emulator::require_aligned(p, alignof(T), #NAME, site);        \
    return *p;                                                    \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldlu)
#undef EMULATOR_LOAD
#define EMULATOR_STORE(NAME)                                                      \
  template <class T>                                                              \
  static void NAME(T* p, typename emulator::Same<T>::type value, EMULATOR_HERE) { \
    emulator::require_aligned(p, alignof(T), #NAME, site);                        \
    *p = value;                                                                   \
  }
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

// ---- arithmetic; macros where glibc has declared the name
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static inline float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.f / x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }

#define EMULATOR_MIN_MAX(T)                                 \
  static inline T min(T a, T b) { return a < b ? a : b; }   \
  static inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

// ---- bits
template <class To, class From>
static To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static inline float __int_as_float(int x) { return emulator_bits<float>(x); }
static inline int __float_as_int(float x) { return emulator_bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 15;
    unsigned byte = bytes >> (pick & 7) * 8 & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;  // replicate the sign
    result |= byte << (8 * i);
  }
  return result;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (shift & 31));
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
static inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i);
  return c;
}

// ---- float to integer: out of range saturates and NaN becomes 0, where C++ leaves both undefined
template <class T>
static T emulator_to_integer(double x, double low, double high) {
  return x != x ? 0 : static_cast<T>(x < low ? low : x > high ? high : x);
}
#define EMULATOR_TO_INTEGER(SUFFIX, ROUND)                                                                        \
  static inline int __float2int_##SUFFIX(float x) {                                                               \
    return emulator_to_integer<int>(ROUND(x), -2147483648.0, 2147483647.0);                                       \
  }                                                                                                               \
  static inline unsigned __float2uint_##SUFFIX(float x) {                                                         \
    return emulator_to_integer<unsigned>(ROUND(x), 0.0, 4294967295.0);                                            \
  }
EMULATOR_TO_INTEGER(rn, nearbyintf)
EMULATOR_TO_INTEGER(rz, truncf)
EMULATOR_TO_INTEGER(ru, ceilf)
EMULATOR_TO_INTEGER(rd, floorf)
#undef EMULATOR_TO_INTEGER
static inline float __int2float_rn(int x) { return static_cast<float>(x); }
static inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
