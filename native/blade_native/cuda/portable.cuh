// Everything in the kernels that is not plain CUDA C++: inline PTX, each function with its twin for the CPU emulator
// (see docs/cuda-emulator.md). Kernels include this file alone and hold no asm of their own.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

// DYN_SMEM(T, name): T* name = the block's dynamic shared memory, 128-byte aligned. Its size is the launch's.
#ifdef BLADE_EMULATOR
#define DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(emulator::dynamic_shared())
#define CALL_SITE emulator::Site site = emulator::Site::here()  // last parameter: where reports say a function was called
#define AND_CALL_SITE , CALL_SITE
#else
#define CALL_SITE
#define AND_CALL_SITE
#define DYN_SMEM(T, name)                                              \
  extern __shared__ __align__(128) unsigned char blade_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(blade_dynamic_shared)
#endif

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;  // exp(x) = ex2(x * LOG2E)
#define NEG_INF __int_as_float(0xff800000)

namespace ptx {

// 2^x, relative error 2^-22; ex2(-inf) = 0.
__device__ __forceinline__ float ex2(float x) {
#ifdef BLADE_EMULATOR
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 16 bytes of data that is read once and by nobody else during the launch: kept out of L1.
__device__ __forceinline__ uint4 ldg_stream(const void* p AND_CALL_SITE) {
#ifdef BLADE_EMULATOR
  return __ldg(static_cast<const uint4*>(p), site);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
#endif
}

// Start copying 16 bytes from global to shared memory, or storing 16 zero bytes where !valid (gmem is not read then).
// They are there after cp_async_wait by the thread that started them and a barrier among those that read them.
__device__ __forceinline__ void cp_async16(void* smem, const void* gmem, bool valid = true AND_CALL_SITE) {
#ifdef BLADE_EMULATOR
  emulator::cp_async(smem, gmem, 16, valid ? 16 : 0, site);
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(smem))), "l"(gmem), "r"(valid ? 16 : 0) : "memory");
#endif
}

// The same of BYTES, 8 or 16, of which the first `valid` are read and the others become zeros.
template <int BYTES>
__device__ __forceinline__ void cp_async_part(void* smem, const void* gmem, int valid AND_CALL_SITE) {
#ifdef BLADE_EMULATOR
  emulator::cp_async(smem, gmem, BYTES, valid, site);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(smem));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(gmem), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %3, %2;" ::"r"(to), "l"(gmem), "r"(valid), "n"(BYTES)
                 : "memory");
#endif
}

// Close the group of copies started since the last commit; an empty group counts.
__device__ __forceinline__ void cp_async_commit(CALL_SITE) {
#ifdef BLADE_EMULATOR
  emulator::cp_commit(site);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most N of this thread's groups, the youngest, are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#ifdef BLADE_EMULATOR
  emulator::cp_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four 8x8 tiles of 16-bit elements, one register each. Lane l gives the address of row l % 8 of tile l / 8 (16 bytes,
// aligned) and receives elements (row l / 4, columns 2 * (l % 4) and + 1) of every tile, of its transpose with TRANS.
template <bool TRANS>
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row AND_CALL_SITE) {
#ifdef BLADE_EMULATOR
  emulator::ldmatrix(r, row, 4, TRANS, site);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#endif
}

// C[16, 8] += A[16, 16] B[16, 8] on the tensor cores; T is __half or __nv_bfloat16, C is float. With g = lane / 4 and
// t = lane % 4 a lane holds: A at (g + 8 * (i & 1), 2 * t + 8 * (i >> 1)) and the next column in a[i];
// B at (2 * t + 8 * i, g) and the next row in b_i; C at (g + 8 * (i >> 1), 2 * t + (i & 1)) in c[i].
// mma16816_first is the same for C of zeros, whatever c holds.
#ifdef BLADE_EMULATOR
template <class T>
__device__ __forceinline__ void mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, CALL_SITE) {
  const unsigned b[2] = {b0, b1};
  emulator::mma16816<T>(c, a, b, site);
}
template <class T>
__device__ __forceinline__ void mma16816_first(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                               CALL_SITE) {
  c[0] = c[1] = c[2] = c[3] = 0.f;
  mma16816<T>(c, a, b0, b1, site);
}
#else
template <class T>
__device__ __forceinline__ void mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <class T>
__device__ __forceinline__ void mma16816_first(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
#define BLADE_MMA16816(T, NAME)                                                                                       \
  template <>                                                                                                         \
  __device__ __forceinline__ void mma16816<T>(float(&c)[4], const unsigned(&a)[4], unsigned b0, unsigned b1) {        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
                 "{%0,%1,%2,%3};"                                                                                     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                     \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void mma16816_first<T>(float(&c)[4], const unsigned(&a)[4], unsigned b0, unsigned b1) {  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
                 "{%10,%10,%10,%10};"                                                                                 \
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));                           \
  }
BLADE_MMA16816(__half, "f16")
BLADE_MMA16816(__nv_bfloat16, "bf16")
#undef BLADE_MMA16816
#endif

}  // namespace ptx

// ---- conversions between float and the element types of tensors

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(__nv_fp8_e5m2 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(signed char x) { return static_cast<float>(x); }

// Round to nearest even; fp8 saturates at its largest finite value, signed char at -127 and 127.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) { return __nv_fp8_e4m3(x); }
template <>
__device__ __forceinline__ __nv_fp8_e5m2 from_float<__nv_fp8_e5m2>(float x) { return __nv_fp8_e5m2(x); }
template <>
__device__ __forceinline__ signed char from_float<signed char>(float x) {
  return static_cast<signed char>(__float2int_rn(fminf(fmaxf(x, -127.f), 127.f)));
}

// Two 16-bit elements in one register, lo in the low half: what mma fragments hold.
template <class T>
__device__ __forceinline__ unsigned pack2(float lo, float hi) {
  const T a = from_float<T>(lo), b = from_float<T>(hi);
  return static_cast<unsigned>(*reinterpret_cast<const unsigned short*>(&a)) |
         static_cast<unsigned>(*reinterpret_cast<const unsigned short*>(&b)) << 16;
}

// 16 bytes of T as floats.
template <class T, int N>
__device__ __forceinline__ void unpack(const uint4& v, float (&f)[N]) {
  static_assert(N * sizeof(T) == 16, "N elements of T make 16 bytes");
  const T* p = reinterpret_cast<const T*>(&v);
#pragma unroll
  for (int i = 0; i < N; ++i) f[i] = to_float(p[i]);
}

// a * b + c of two 16-bit elements each, rounded once.
#ifdef BLADE_EMULATOR
template <class T>
__device__ __forceinline__ unsigned fma2(unsigned a, unsigned b, unsigned c) {
  float sums[2];
  for (int i = 0; i < 2; ++i)
    sums[i] = fmaf(to_float(reinterpret_cast<const T*>(&a)[i]), to_float(reinterpret_cast<const T*>(&b)[i]),
                   to_float(reinterpret_cast<const T*>(&c)[i]));
  return pack2<T>(sums[0], sums[1]);
}
#else
template <class T>
__device__ __forceinline__ unsigned fma2(unsigned a, unsigned b, unsigned c);
#define BLADE_FMA2(T, NAME)                                                                     \
  template <>                                                                                   \
  __device__ __forceinline__ unsigned fma2<T>(unsigned a, unsigned b, unsigned c) {             \
    unsigned sum;                                                                               \
    asm("fma.rn." NAME " %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));                \
    return sum;                                                                                 \
  }
BLADE_FMA2(__half, "f16x2")
BLADE_FMA2(__nv_bfloat16, "bf16x2")
#undef BLADE_FMA2
#endif
