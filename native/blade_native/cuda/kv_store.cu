// Rotary position embedding (Su et al. 2021) of q and k, and the store of k and v into the paged cache, in one pass.
#include "kv_storage.cuh"

constexpr int STORE_WARPS = 4;

template <class T, class S>
struct StoreArgs {
  T* q;                        // [T, H, D], rotated in place, and transformed as keys of 8 bits are
  T* k;                        // [T, KV, D], rotated in place
  const T* v;                  // [T, KV, D]
  S* kv;                       // see kv_storage.cuh
  float* scales;               // null unless S is scaled
  S* origins;                  // [num_blocks, KV, D], null unless S has 8 bits
  float* origin_scales;        // [num_blocks, KV], null unless S is scaled
  const float* cos_sin;        // [max_context, rotary_dim]: cosines, then sines
  const long long* positions;  // [T]
  const long long* slots;      // [T]; negative: a padding token, not stored
  const int* block_tables;     // [B, table_stride]
  const int* cu_seqlens;       // [B + 1]
  long long q_stride, k_stride, v_stride;  // elements from token to token
  int num_heads, num_kv_heads, rotary_dim, block_size, num_seqs, table_stride;
  int phase;
};

// Of a store: all at once, where no token needs the origin that another one of this step makes; or two launches.
constexpr int ALL = 0, ORIGINS = 1, REST = 2;

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

// A head in a warp, two channels a lane, 64 in all at [i]. Channels beyond D are 0.
template <int D>
struct Head {
  static constexpr int PER = (D / 2 + 31) / 32;
  float2 x[PER];

  // Every block of D's largest power of two times an orthonormal Hadamard matrix: see attention's torch twin.
  __device__ __forceinline__ void transform(int lane) {
    constexpr int BLOCK = D & -D;
    constexpr float FACTOR = BLOCK == 256 ? 0.0625f : BLOCK == 128 ? 0.0883883476f : BLOCK == 64 ? 0.125f
                             : BLOCK == 32 ? 0.176776695f : 0.25f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      x[i] = make_float2((x[i].x + x[i].y) * FACTOR, (x[i].x - x[i].y) * FACTOR);
#pragma unroll
      for (int other = 1; other < BLOCK / 2 && other < 32; other *= 2) {
        const float sign = lane & other ? -1.f : 1.f;
        x[i].x = __shfl_xor_sync(FULL_WARP, x[i].x, other) + sign * x[i].x;
        x[i].y = __shfl_xor_sync(FULL_WARP, x[i].y, other) + sign * x[i].y;
      }
    }
#pragma unroll
    for (int other = 1; other < BLOCK / 64; other *= 2)
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        if (i & other) continue;
        const float2 a = x[i], b = x[i + other];
        x[i] = make_float2(a.x + b.x, a.y + b.y), x[i + other] = make_float2(a.x - b.x, a.y - b.y);
      }
  }

  // Rounds to S, `to` [D]; returns the scale, 1 where S has none.
  template <class S>
  __device__ __forceinline__ float store(S* to, int lane) const {
    float scale = 1.f;
    if constexpr (SCALED<S>) {
      float largest = 0.f;
      bool finite = true;
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        const float a = fabsf(x[i].x), b = fabsf(x[i].y);
        largest = fmaxf(largest, fmaxf(a, b));
        finite = finite && a < -NEG_INF && b < -NEG_INF;
      }
      scale = int8_scale(largest, finite);
    }
    const float inverse = scale > 0.f ? 1.f / scale : 0.f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d >= D) continue;
      const Two<S> stored = {from_float<S>(x[i].x * inverse), from_float<S>(x[i].y * inverse)};
      *reinterpret_cast<Two<S>*>(to + d) = stored;
    }
    return scale;
  }

  template <class S>
  __device__ __forceinline__ void subtract(const S* from, float scale, int lane) {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d >= D) continue;
      const Two<S> stored = *reinterpret_cast<const Two<S>*>(from + d);
      x[i].x -= scale * to_float(stored.x), x[i].y -= scale * to_float(stored.y);
    }
  }
};

// The first block of the sequence that has this token.
__device__ __forceinline__ long long first_block(const int* cu_seqlens, int num_seqs, const int* tables, int stride,
                                                 int token) {
  int low = 0, high = num_seqs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu_seqlens[middle] <= token) low = middle;
    else high = middle;
  }
  return tables[static_cast<long long>(low) * stride];
}

// A key of 8 bits is kept after a Hadamard transform, and relative to an origin: the first key of its sequence, itself
// rounded, which lies with the sequence's first block.
template <class T, class S, int D>
__device__ __forceinline__ void relate(Head<D>& head, const StoreArgs<T, S>& args, int kv_head, long long token, int lane) {
  const long long block = first_block(args.cu_seqlens, args.num_seqs, args.block_tables, args.table_stride, token);
  const long long at = block * args.num_kv_heads + kv_head;
  S* origin = args.origins + at * D;
  if (args.positions[token] == 0 && args.phase != REST) {
    const float scale = head.template store<S>(origin, lane);
    if (SCALED<S> && lane == 0) args.origin_scales[at] = scale;
    __syncwarp();
  }
  head.subtract(origin, SCALED<S> ? args.origin_scales[at] : 1.f, lane);
}

// grid (T, (H + 2 KV) / STORE_WARPS rounded up), block (32 * STORE_WARPS): a head a warp, two channels a lane.
// check: rope_and_store<__nv_bfloat16, {__nv_bfloat16, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
// check: rope_and_store<__half, {__half, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
// check: rope_and_store<float, {float, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
template <class T, class S, int D>
__global__ void __launch_bounds__(STORE_WARPS * 32) rope_and_store(const StoreArgs<T, S> args) {
  constexpr int PER = Head<D>::PER;
  constexpr bool RELATED = sizeof(S) == 1;
  const int lane = threadIdx.x % 32, unit = blockIdx.y * STORE_WARPS + threadIdx.x / 32;
  const bool is_q = unit < args.num_heads, is_v = unit >= args.num_heads + args.num_kv_heads;
  if (unit >= args.num_heads + 2 * args.num_kv_heads) return;
  const int head = is_q ? unit : (unit - args.num_heads) % args.num_kv_heads;
  const long long token = blockIdx.x, slot = args.slots[token];
  if (args.phase == ORIGINS && (is_q || is_v || args.positions[token] != 0)) return;
  const T* from = is_q   ? args.q + token * args.q_stride
                  : is_v ? args.v + token * args.v_stride
                         : args.k + token * args.k_stride;
  from += head * D;

  Head<D> x;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int d = (i * 32 + lane) * 2;
    x.x[i] = make_float2(0.f, 0.f);
    if (d >= D) continue;
    const Two<T> raw = *reinterpret_cast<const Two<T>*>(from + d);
    x.x[i] = make_float2(to_float(raw.x), to_float(raw.y));
    if (is_v) continue;
    const float* cos_sin = args.cos_sin + args.positions[token] * args.rotary_dim;
    x.x[i].x = to_float(from_float<T>(rotated(from, d, x.x[i].x, cos_sin, args.rotary_dim)));
    x.x[i].y = to_float(from_float<T>(rotated(from, d + 1, x.x[i].y, cos_sin, args.rotary_dim)));
  }
  __syncwarp();  // all have read what is now overwritten
  if (RELATED && is_q) x.transform(lane);
  if (!is_v && args.phase != ORIGINS) {
    T* to = (is_q ? args.q + token * args.q_stride : args.k + token * args.k_stride) + head * D;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d >= D) continue;
      const Two<T> rounded = {from_float<T>(x.x[i].x), from_float<T>(x.x[i].y)};
      *reinterpret_cast<Two<T>*>(to + d) = rounded;
    }
  }
  if (is_q || slot < 0) return;
  if constexpr (RELATED)
    if (!is_v) {
      x.transform(lane);
      relate(x, args, head, token, lane);
    }
  if (args.phase == ORIGINS) return;

  const long long block = slot >> (__ffs(args.block_size) - 1);  // a power of 2
  const long long row = cache_row(block, is_v ? args.num_kv_heads + head : head, args.num_kv_heads, args.block_size) +
                        (slot & (args.block_size - 1));
  const float scale = x.template store<S>(args.kv + row * D, lane);
  if (SCALED<S> && lane == 0) args.scales[row] = scale;
}
