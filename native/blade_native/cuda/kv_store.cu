// Rotary position embedding (Su et al. 2021) of q and k, and the store of k and v into the paged cache, in one pass.
#include "kv_storage.cuh"

constexpr int STORE_WARPS = 4;

template <class T, class S>
struct StoreArgs {
  T* q;                        // [T, H, D], rotated in place
  T* k;                        // [T, KV, D], rotated in place
  const T* v;                  // [T, KV, D]
  S* kv;                       // see kv_storage.cuh
  float* scales;               // null unless S is scaled
  const float* cos_sin;        // [max_context, rotary_dim]: cosines, then sines
  const long long* positions;  // [T]
  const long long* slots;      // [T]; negative: a padding token, not stored
  long long q_stride, k_stride, v_stride;  // elements from token to token
  int num_heads, num_kv_heads, rotary_dim, block_size;
};

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};

// The channel at d of a head, rotated; halves of the first rotary_dim channels pair up, as in GPT-NeoX.
template <class T>
__device__ __forceinline__ float rotated(const T* head, int d, float x, const float* cos_sin, int rotary_dim) {
  if (d >= rotary_dim) return x;
  const int half = rotary_dim / 2, angle = d < half ? d : d - half;
  const float other = to_float(head[d < half ? d + half : d - half]), sine = cos_sin[half + angle];
  return x * cos_sin[angle] + (d < half ? -other : other) * sine;
}

// The scale that maps a warp's largest magnitude to 127; NaN where there is a number that is not finite.
__device__ __forceinline__ float int8_scale(float largest, bool finite) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, lane));
  return __all_sync(FULL_WARP, finite) ? largest / 127.f : __int_as_float(0x7fffffff);
}

// grid (T, (H + 2 KV) / STORE_WARPS rounded up), block (32 * STORE_WARPS): a head a warp, two channels a lane.
// check: rope_and_store<__nv_bfloat16, {__nv_bfloat16, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
// check: rope_and_store<__half, {__half, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
// check: rope_and_store<float, {float, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
template <class T, class S, int D>
__global__ void __launch_bounds__(STORE_WARPS * 32) rope_and_store(const StoreArgs<T, S> args) {
  constexpr int PER = (D / 2 + 31) / 32;
  const int lane = threadIdx.x % 32, unit = blockIdx.y * STORE_WARPS + threadIdx.x / 32;
  const bool is_q = unit < args.num_heads, is_v = unit >= args.num_heads + args.num_kv_heads;
  if (unit >= args.num_heads + 2 * args.num_kv_heads) return;
  const int head = is_q ? unit : (unit - args.num_heads) % args.num_kv_heads;
  const long long token = blockIdx.x, slot = args.slots[token];
  const T* from = is_q   ? args.q + token * args.q_stride
                  : is_v ? args.v + token * args.v_stride
                         : args.k + token * args.k_stride;
  from += head * D;

  Two<T> x[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int d = (i * 32 + lane) * 2;
    if (d >= D) continue;
    x[i] = *reinterpret_cast<const Two<T>*>(from + d);
    if (is_v) continue;
    const float* cos_sin = args.cos_sin + args.positions[token] * args.rotary_dim;
    x[i].x = from_float<T>(rotated(from, d, to_float(x[i].x), cos_sin, args.rotary_dim));
    x[i].y = from_float<T>(rotated(from, d + 1, to_float(x[i].y), cos_sin, args.rotary_dim));
  }
  __syncwarp();  // all have read what is now overwritten
  if (!is_v) {
    T* to = (is_q ? args.q + token * args.q_stride : args.k + token * args.k_stride) + head * D;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d < D) *reinterpret_cast<Two<T>*>(to + d) = x[i];
    }
  }
  if (is_q || slot < 0) return;

  const long long block = slot >> (__ffs(args.block_size) - 1);  // a power of 2
  const long long row = cache_row(block, is_v ? args.num_kv_heads + head : head, args.num_kv_heads, args.block_size) +
                        (slot & (args.block_size - 1));
  float inverse = 1.f;
  if constexpr (SCALED<S>) {
    float largest = 0.f;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if ((i * 32 + lane) * 2 >= D) continue;
      const float a = fabsf(to_float(x[i].x)), b = fabsf(to_float(x[i].y));
      largest = fmaxf(largest, fmaxf(a, b));
      finite = finite && a < -NEG_INF && b < -NEG_INF;
    }
    const float scale = int8_scale(largest, finite);
    inverse = scale > 0.f ? 1.f / scale : 0.f;
    if (lane == 0) args.scales[row] = scale;
  }
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int d = (i * 32 + lane) * 2;
    if (d >= D) continue;
    const Two<S> stored = {from_float<S>(to_float(x[i].x) * inverse), from_float<S>(to_float(x[i].y) * inverse)};
    *reinterpret_cast<Two<S>*>(args.kv + row * D + d) = stored;
  }
}
