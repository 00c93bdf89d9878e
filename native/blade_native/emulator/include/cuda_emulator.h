// emulator.h - run CUDA C++ kernel source on the CPU (g++), one fiber per CUDA thread.
// One block at a time, one OS thread: deterministic; a seed permutes the schedule.
// Sanitizers: ASan (OOB on smem + malloc'd tensors), UBSan (misaligned vector access),
// TSan (each fiber is a TSan "thread": shared-memory races that lack a barrier are reported).
#pragma once
#define BLADE_EMULATOR 1
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <sys/mman.h>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" { void* __tsan_get_current_fiber(); void* __tsan_create_fiber(unsigned); void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned); void __tsan_acquire(void*); void __tsan_release(void*); void __tsan_set_fiber_name(void*, const char*); }
#define BLADE_EMULATOR_NOSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define BLADE_EMULATOR_NOSAN __attribute__((noinline))
#endif

namespace emulator {
enum State { READY, BAR, WARP, DONE };
struct CpAsync { void* dst; const void* src; int n, valid; };
struct Fiber {
  void* sp = nullptr; uint3 tid{}; int lin = 0, lane = 0, warp = 0; State state = DONE;
  char* stack = nullptr; int site = 0; const void* kind = nullptr; unsigned mask = 0; void* payload = nullptr; int pred = 0;
  std::vector<CpAsync> cpq; std::vector<size_t> cpgroups;      // cp.async queue, start of every committed group
  void* tsan = nullptr; void* asan_fake = nullptr;
};
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t STACK = 512 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif
struct Warp { unsigned alive = 0, waiting = 0; char sync = 0; };
struct Ctx {
  Fiber mainf; std::vector<Fiber> f; std::vector<Warp> w; std::vector<int> q; size_t qh = 0, qt = 0;
  int n = 0, alive = 0, nbar = 0, bar_or = 0, bar_and = 1, bar_cnt = 0, res_or = 0, res_and = 0, res_cnt = 0;
  unsigned char* smem = nullptr; size_t smem_bytes = 0; char* blk_sync = nullptr; bool unordered = false;
  void (*entry)(void**) = nullptr; void** args = nullptr; std::string err; std::mt19937 rng{0}; unsigned seed = 0;
  const void* main_lo = nullptr; size_t main_sz = 0; unsigned long long switches = 0;
};
inline Ctx& C = *new Ctx;                              // never destroyed
inline Fiber* cur = &C.mainf;
inline uint3 g_blockIdx{}; inline dim3 g_blockDim, g_gridDim;

#if defined(__x86_64__)
extern "C" void emulator_switch(void** save_sp, void* load_sp);
asm(R"(.text
.p2align 4
.local emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
#else
#error "emulator: port emulator_switch (or use ucontext) for this CPU"
#endif

BLADE_EMULATOR_NOSAN static void go(Fiber* to) {                 // switch context cur -> to
  Fiber* me = cur; cur = to; ++C.switches;
#if defined(__SANITIZE_ADDRESS__)
  const void* lo = to == &C.mainf ? C.main_lo : to->stack; size_t sz = to == &C.mainf ? C.main_sz : STACK;
  __sanitizer_start_switch_fiber(me->state == DONE && me != &C.mainf ? nullptr : &me->asan_fake, lo, sz);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to->tsan, 1 /* no_sync: a switch is not a happens-before edge */);
#endif
  emulator_switch(&me->sp, to->sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->asan_fake, nullptr, nullptr);
#endif
}
BLADE_EMULATOR_NOSAN static void push(Fiber* t) { t->state = READY; C.q[C.qt++ % C.q.size()] = t->lin; }
BLADE_EMULATOR_NOSAN static void dispatch() {                    // run the next ready fiber (main when none is)
  Fiber* nx = C.qh == C.qt ? &C.mainf : &C.f[C.q[C.qh++ % C.q.size()]];
  if (nx != cur) go(nx);
}
BLADE_EMULATOR_NOSAN [[noreturn]] static void fail(const char* fmt, ...) {
  char b[512]; va_list ap; va_start(ap, fmt); vsnprintf(b, sizeof b, fmt, ap); va_end(ap);
  char p[128]; snprintf(p, sizeof p, "[block (%u,%u,%u) thread (%u,%u,%u)] ", g_blockIdx.x, g_blockIdx.y, g_blockIdx.z, cur->tid.x, cur->tid.y, cur->tid.z);
  C.err = std::string(p) + b; cur->state = DONE; go(&C.mainf); abort();
}
BLADE_EMULATOR_NOSAN static void release_all(std::vector<Fiber*>& v) { if (C.seed) std::shuffle(v.begin(), v.end(), C.rng); for (auto* t : v) push(t); }

// ---- block barrier
BLADE_EMULATOR_NOSAN static void bar_release() {
  C.nbar = 0; C.res_or = C.bar_or; C.res_and = C.bar_and; C.res_cnt = C.bar_cnt; C.bar_or = 0; C.bar_and = 1; C.bar_cnt = 0;
  int site = -1; std::vector<Fiber*> v;
  for (auto& t : C.f) if (t.state == BAR) { if (site == -1) site = t.site; else if (site != t.site) fail("divergent __syncthreads: line %d and line %d", site, t.site); v.push_back(&t); }
  if (C.alive != C.n) fail("__syncthreads at line %d after some threads of the block returned", site);
  release_all(v);
}
BLADE_EMULATOR_NOSAN static void syncthreads(int site, int pred = 0) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(C.blk_sync);
#endif
  cur->site = site; cur->state = BAR; C.bar_or |= pred != 0; C.bar_and &= pred != 0; C.bar_cnt += pred != 0;
  if (++C.nbar == C.alive) bar_release();
  dispatch();
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(C.blk_sync);
#endif
}
// ---- warp collectives: every lane parks a payload; the last one to arrive runs fn over all of them
using Fn = void (*)(void** payload, unsigned mask);
BLADE_EMULATOR_NOSAN static bool try_complete(Warp& w, int warp, unsigned mask, Fn fn) {
  unsigned need = mask & w.alive; if ((w.waiting & need) != need) return false;
  void* pl[32] = {}; Fiber* base = &C.f[warp * 32]; std::vector<Fiber*> v; int site = -1;
  for (int l = 0; l < 32; ++l) if (need >> l & 1) {
    Fiber& t = base[l]; if (t.mask != mask || t.kind != (const void*)fn) return false;
    if (site == -1) site = t.site; else if (site != t.site) fail("divergent warp collective: line %d and line %d", site, t.site);
    pl[l] = t.payload; v.push_back(&t);
  }
  if (fn) fn(pl, need);
  w.waiting &= ~need; release_all(v); return true;
}
BLADE_EMULATOR_NOSAN static void collective(int site, unsigned mask, void* payload, Fn fn) {
  Warp& w = C.w[cur->warp];
  if (!(mask >> cur->lane & 1)) fail("line %d: lane %d calls a _sync collective with mask %08x that lacks it", site, cur->lane, mask);
  cur->site = site; cur->mask = mask; cur->kind = (const void*)fn; cur->payload = payload; cur->state = WARP; w.waiting |= 1u << cur->lane;
  try_complete(w, cur->warp, mask, fn); dispatch();
}
BLADE_EMULATOR_NOSAN static void on_exit_thread() {
  Warp& w = C.w[cur->warp]; w.alive &= ~(1u << cur->lane); --C.alive; cur->state = DONE;
  if (C.alive && C.nbar == C.alive) bar_release();
  for (int l = 0; l < 32; ++l) if (w.waiting >> l & 1) { Fiber& t = C.f[cur->warp * 32 + l]; if (try_complete(w, cur->warp, t.mask, (Fn)t.kind)) break; }
}
BLADE_EMULATOR_NOSAN static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, C.main_lo ? nullptr : &C.main_lo, &C.main_sz);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(C.blk_sync);
#endif
  C.entry(C.args);
  if (!cur->cpq.empty()) fail("thread returned with cp.async copies never waited for");
#if defined(__SANITIZE_THREAD__)
  __tsan_release(C.blk_sync);
#endif
  on_exit_thread(); dispatch(); abort();
}
BLADE_EMULATOR_NOSAN static void run_block() {
  int n = C.n; C.q.assign(n + 1, 0); C.qh = C.qt = 0; C.alive = n; C.nbar = 0; C.bar_or = 0; C.bar_and = 1; C.bar_cnt = 0;
  C.w.assign((n + 31) / 32, Warp{}); std::vector<Fiber*> v; for (auto& t : C.f) t.state = DONE;
#if defined(__SANITIZE_THREAD__)
  if (C.unordered || !C.blk_sync) C.blk_sync = new char;  // BLADE_EMULATOR_TSAN_BLOCKS=1: no happens-before edge between blocks (dynamic smem only)
  if (C.unordered) { free(C.smem); C.smem = (unsigned char*)aligned_alloc(128, (C.smem_bytes + 255) / 128 * 128); }
#endif
  memset(C.smem, 0xFF, C.smem_bytes);                    // NaN in f32/f16/bf16, -1 in ints: uninitialised shared memory shows
  for (int i = 0; i < n; ++i) {
    Fiber& t = C.f[i]; t.lin = i; t.lane = i & 31; t.warp = i >> 5; t.cpq.clear(); t.cpgroups.clear(); t.asan_fake = nullptr;
    t.tid = uint3{i % g_blockDim.x, i / g_blockDim.x % g_blockDim.y, i / (g_blockDim.x * g_blockDim.y)};
    if (!t.stack) { t.stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); mprotect(t.stack, 4096, PROT_NONE); }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(t.stack + 4096, STACK - 4096);
#endif
#if defined(__SANITIZE_THREAD__)
    if (t.tsan) __tsan_destroy_fiber(t.tsan); t.tsan = __tsan_create_fiber(0);
    char nm[64]; snprintf(nm, sizeof nm, "cuda block(%u,%u,%u) thread(%u,%u,%u)", g_blockIdx.x, g_blockIdx.y, g_blockIdx.z, t.tid.x, t.tid.y, t.tid.z); __tsan_set_fiber_name(t.tsan, nm);
#endif
    void** s = (void**)(t.stack + STACK - 64); *--s = nullptr; *--s = (void*)fiber_main; s -= 6; memset(s, 0, 48); t.sp = s;
    C.w[t.warp].alive |= 1u << t.lane; v.push_back(&t);
  }
  release_all(v); cur = &C.mainf; dispatch();            // returns when no fiber is ready
#if defined(__SANITIZE_THREAD__)
  if (!C.unordered) __tsan_acquire(C.blk_sync);
#endif
  if (C.err.empty() && C.alive) {
    std::string e = "deadlock: ";
    for (int i = 0, k = 0; i < n && k < 6; ++i) { Fiber& t = C.f[i]; if (t.state == BAR || t.state == WARP) { char b[128]; snprintf(b, sizeof b, "thread %d waits at line %d (%s mask %08x); ", i, t.site, t.state == BAR ? "__syncthreads" : "warp op", t.mask); e += b; ++k; } }
    C.err = e;
  }
}
struct Kernel { void (*entry)(void**); std::vector<int> size; std::string kind; };
inline std::map<std::string, Kernel>& registry() { static std::map<std::string, Kernel> r; return r; }
template <class T> constexpr char kind_of() { return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, bool> ? 'b' : std::is_floating_point_v<T> ? 'f' : std::is_unsigned_v<T> ? 'u' : std::is_integral_v<T> ? 'i' : 's'; }
template <auto F> struct Thunk;
template <class... A, void (*F)(A...)> struct Thunk<F> {
  template <size_t... I> static void call(void** p, std::index_sequence<I...>) { F(*(std::remove_const_t<A>*)p[I]...); }
  static void entry(void** p) { call(p, std::index_sequence_for<A...>{}); }
  static Kernel make() { return Kernel{&entry, {int(sizeof(A))...}, std::string{kind_of<A>()...}}; }
};
struct Reg { Reg(const char* n, Kernel k) { registry()[n] = std::move(k); } };

// ---- warp intrinsics
static inline __attribute__((always_inline)) void rawcpy(void* d, const void* s, size_t n) { asm volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n)::"memory"); }  // not seen by TSan: the hardware moves these, not a thread
template <class T> struct Shfl { T v, r; int src; };
template <class T> BLADE_EMULATOR_NOSAN static void shfl_fn(void** p, unsigned m) { for (int l = 0; l < 32; ++l) if (m >> l & 1) { auto* s = (Shfl<T>*)p[l]; if (m >> s->src & 1) rawcpy(&s->r, &((Shfl<T>*)p[s->src])->v, sizeof(T)); else for (size_t i = 0; i < sizeof(T); ++i) ((volatile char*)&s->r)[i] = -1; } }
template <class T> static T shfl(int site, unsigned m, T v, int src) { Shfl<T> s{v, v, src}; collective(site, m, &s, shfl_fn<T>); return s.r; }
template <class T> static T shfl_idx(int site, unsigned m, T v, int l, int w = 32) { return shfl(site, m, v, (cur->lane & ~(w - 1)) | (l & (w - 1))); }
template <class T> static T shfl_xor(int site, unsigned m, T v, int x, int w = 32) { int s = cur->lane ^ x; return shfl(site, m, v, s < ((cur->lane & ~(w - 1)) + w) ? s : cur->lane); }
template <class T> static T shfl_down(int site, unsigned m, T v, int d, int w = 32) { int s = cur->lane + d; return shfl(site, m, v, s < ((cur->lane & ~(w - 1)) + w) ? s : cur->lane); }
template <class T> static T shfl_up(int site, unsigned m, T v, int d, int w = 32) { int s = cur->lane - d; return shfl(site, m, v, s >= (cur->lane & ~(w - 1)) ? s : cur->lane); }
struct Vote { unsigned pred, r; };
BLADE_EMULATOR_NOSAN static inline void vote_fn(void** p, unsigned m) { unsigned b = 0; for (int l = 0; l < 32; ++l) if (m >> l & 1) b |= unsigned(((Vote*)p[l])->pred != 0) << l; for (int l = 0; l < 32; ++l) if (m >> l & 1) ((Vote*)p[l])->r = b; }
static inline unsigned ballot(int site, unsigned m, int pred) { Vote v{unsigned(pred), 0}; collective(site, m, &v, vote_fn); return v.r; }
static inline void syncwarp(int site, unsigned m = 0xffffffffu) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&C.w[cur->warp].sync);
#endif
  collective(site, m, nullptr, nullptr);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&C.w[cur->warp].sync);
#endif
}
// ---- cp.async: copies land only at the wait, so a missing wait reads poison
static inline void cp_async(void* d, const void* s, int n, int valid) { if ((uintptr_t)d % n || (valid && (uintptr_t)s % n)) fail("cp.async: %d-byte copy misaligned", n); cur->cpq.push_back({d, s, n, valid}); }
static inline void cp_commit() { cur->cpgroups.push_back(cur->cpq.size()); }
static inline void cp_wait(int pending) {
  auto& g = cur->cpgroups; if ((int)g.size() <= pending) return; size_t upto = g[g.size() - 1 - pending];
  for (size_t i = 0; i < upto; ++i) { auto& c = cur->cpq[i]; memcpy(c.dst, c.src, c.valid); memset((char*)c.dst + c.valid, 0, c.n - c.valid); }
  cur->cpq.erase(cur->cpq.begin(), cur->cpq.begin() + upto); g.erase(g.begin(), g.end() - pending); for (auto& x : g) x -= upto;
}
// ---- ldmatrix / mma.sync m16n8k16 with the PTX fragment layouts
static inline void full_warp(const char* w) { if (C.w[cur->warp].alive != ~0u) fail("%s needs all 32 lanes alive", w); }
struct LdM { const void* row; uint32_t* r; int nm; bool trans; };
BLADE_EMULATOR_NOSAN static inline void ldm_fn(void** p, unsigned) {
  uint32_t out[32][4];
  for (int l = 0; l < 32; ++l) { auto* s = (LdM*)p[l]; for (int m = 0; m < s->nm; ++m) {
    if (!s->trans) rawcpy(&out[l][m], (const char*)((LdM*)p[m * 8 + l / 4])->row + l % 4 * 4, 4);
    else { uint16_t a, b; rawcpy(&a, (const char*)((LdM*)p[m * 8 + l % 4 * 2])->row + l / 4 * 2, 2); rawcpy(&b, (const char*)((LdM*)p[m * 8 + l % 4 * 2 + 1])->row + l / 4 * 2, 2); out[l][m] = a | uint32_t(b) << 16; } } }
  for (int l = 0; l < 32; ++l) { auto* s = (LdM*)p[l]; rawcpy(s->r, out[l], 4 * s->nm); }
}
static inline void ldmatrix(uint32_t* r, const void* row, int nm, bool trans) { if ((uintptr_t)row % 16) fail("ldmatrix: row address not 16-byte aligned"); full_warp("ldmatrix"); for (int i = 0; i < 4; ++i) (void)((const volatile uint32_t*)row)[i]; /* the lane reads its row: TSan/ASan see it */ LdM s{row, r, nm, trans}; collective(-2, ~0u, &s, ldm_fn); }
struct Mma { float* d; const uint32_t *a, *b; const float* c; };
template <class E> static float tofloat(uint16_t x);
template <> inline float tofloat<__nv_bfloat16>(uint16_t x) { uint32_t u = uint32_t(x) << 16; float f; memcpy(&f, &u, 4); return f; }
template <> inline float tofloat<__half>(uint16_t x) { __half_raw h; h.x = x; return __half2float(__half(h)); }
template <class E> BLADE_EMULATOR_NOSAN static void mma_fn(void** p, unsigned) {
  float A[16][16], B[16][8], D[32][4];
  for (int l = 0; l < 32; ++l) { auto* s = (Mma*)p[l]; int g = l / 4, t = l % 4;
    for (int i = 0; i < 8; ++i) A[g + (i / 2 % 2) * 8][t * 2 + i % 2 + (i / 4) * 8] = tofloat<E>(uint16_t(s->a[i / 2] >> (i % 2 * 16)));
    for (int i = 0; i < 4; ++i) B[t * 2 + i % 2 + (i / 2) * 8][g] = tofloat<E>(uint16_t(s->b[i / 2] >> (i % 2 * 16))); }
  for (int l = 0; l < 32; ++l) { auto* s = (Mma*)p[l]; int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) { int r = g + i / 2 * 8, c = t * 2 + i % 2; float acc = s->c[i]; for (int k = 0; k < 16; ++k) acc += A[r][k] * B[k][c]; D[l][i] = acc; } }
  for (int l = 0; l < 32; ++l) rawcpy(((Mma*)p[l])->d, D[l], 16);
}
static inline void* dynamic_shared() { return C.smem; }
template <class E> static void mma16816(float* d, const uint32_t* a, const uint32_t* b, const float* c) { full_warp("mma.sync"); Mma s{d, a, b, c}; collective(-3, ~0u, &s, mma_fn<E>); }
}  // namespace emulator

#define threadIdx (emulator::cur->tid)
#define blockIdx (emulator::g_blockIdx)
#define blockDim (emulator::g_blockDim)
#define gridDim (emulator::g_gridDim)
static constexpr int warpSize = 32;
#define __syncthreads() emulator::syncthreads(__LINE__)
#define __syncthreads_or(p) (emulator::syncthreads(__LINE__, (p)), emulator::C.res_or)
#define __syncthreads_and(p) (emulator::syncthreads(__LINE__, (p)), emulator::C.res_and)
#define __syncthreads_count(p) (emulator::syncthreads(__LINE__, (p)), emulator::C.res_cnt)
#define __syncwarp(...) emulator::syncwarp(__LINE__, ##__VA_ARGS__)
#define __shfl_sync(...) emulator::shfl_idx(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::shfl_xor(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shfl_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shfl_up(__LINE__, __VA_ARGS__)
#define __ballot_sync(m, p) emulator::ballot(__LINE__, m, p)
#define __any_sync(m, p) (emulator::ballot(__LINE__, m, p) != 0)
#define __all_sync(m, p) (emulator::ballot(__LINE__, m, !(p)) == 0)
static inline void __threadfence() {} static inline void __threadfence_block() {} static inline void __nanosleep(unsigned) {}
static inline unsigned __activemask() { return emulator::C.w[emulator::cur->warp].alive; }
// ---- math / bit intrinsics
#define __expf(x) expf(x)      // glibc already declares these names
#define __logf(x) logf(x)
static inline float __fdividef(float a, float b) { return a / b; } static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.f / x; } static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; } static inline int __float_as_int(float f) { int i; memcpy(&i, &f, 4); return i; }
static inline float __uint_as_float(unsigned i) { float f; memcpy(&f, &i, 4); return f; } static inline unsigned __float_as_uint(float f) { unsigned i; memcpy(&i, &f, 4); return i; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); } static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; } static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
template <class T> static inline T __ldg(const T* p) { return *p; } template <class T> static inline T __ldcs(const T* p) { return *p; } template <class T> static inline void __stcs(T* p, T v) { *p = v; }
static inline int min(int a, int b) { return a < b ? a : b; } static inline int max(int a, int b) { return a > b ? a : b; }
static inline long long min(long long a, long long b) { return a < b ? a : b; } static inline long long max(long long a, long long b) { return a > b ? a : b; }
// ---- atomics
template <class T> static inline T atomicAdd(T* p, T v) {
  if constexpr (std::is_integral_v<T>) return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  else { T o; __atomic_load(p, &o, __ATOMIC_RELAXED); for (;;) { T n = o + v; if (__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return o; } } }
template <class T> static inline T atomicMax(T* p, T v) { T o = *p; while (o < v && !__atomic_compare_exchange_n(p, &o, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} return o; }
template <class T> static inline T atomicCAS(T* p, T c, T v) { __atomic_compare_exchange_n(p, &c, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); return c; }
template <class T> static inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }

#define EMULATOR_KERNEL(id, ...) static emulator::Reg emulator_reg_##id{#__VA_ARGS__, emulator::Thunk<&__VA_ARGS__>::make()};
// ---- C ABI used by the Python test double
extern "C" __attribute__((visibility("default"))) int emulator_info(const char* name, int* nargs, int* sizes, char* kinds) {
  auto it = emulator::registry().find(name); if (it == emulator::registry().end()) return 1;
  *nargs = (int)it->second.size.size(); for (int i = 0; i < *nargs; ++i) { sizes[i] = it->second.size[i]; kinds[i] = it->second.kind[i]; } return 0;
}
extern "C" BLADE_EMULATOR_NOSAN __attribute__((visibility("default"))) int emulator_launch(const char* name, const unsigned* grid, const unsigned* block, size_t smem, void** args, unsigned seed, char* err, size_t errlen) {
  using namespace emulator; auto it = registry().find(name); if (it == registry().end()) { snprintf(err, errlen, "no kernel %s", name); return 1; }
  C.entry = it->second.entry; C.args = args; C.n = block[0] * block[1] * block[2]; C.err.clear(); C.seed = seed; C.rng.seed(seed);
  C.smem_bytes = smem; C.smem = (unsigned char*)aligned_alloc(128, smem ? (smem + 127) / 128 * 128 : 128);
#if defined(__SANITIZE_ADDRESS__)
  if (smem % 128) __asan_poison_memory_region(C.smem + smem, 128 - smem % 128);
#endif
#if defined(__SANITIZE_THREAD__)
  C.mainf.tsan = __tsan_get_current_fiber(); C.unordered = getenv("BLADE_EMULATOR_TSAN_BLOCKS") != nullptr;
#endif
  g_gridDim = dim3(grid[0], grid[1], grid[2]); g_blockDim = dim3(block[0], block[1], block[2]);
  if ((int)C.f.size() < C.n) C.f.resize(C.n);
  unsigned long long nb = 1ull * grid[0] * grid[1] * grid[2]; std::vector<unsigned long long> order(nb); for (unsigned long long i = 0; i < nb; ++i) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), C.rng);
  for (auto b : order) { g_blockIdx = uint3{unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])}; run_block(); if (!C.err.empty()) break; }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(C.smem, (smem + 127) / 128 * 128);
#endif
  free(C.smem); C.smem = nullptr; if (C.err.empty()) return 0; snprintf(err, errlen, "%s", C.err.c_str()); return 2;
}
extern "C" __attribute__((visibility("default"))) unsigned long long emulator_switches() { return emulator::C.switches; }
