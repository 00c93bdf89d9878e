// Rotary position embedding (Su et al. 2021) of q and k, and the store of k and v into the paged cache, in one pass.
#include "head.cuh"

constexpr int STORE_WARPS = 4;

template <class T, class S>
struct StoreArgs {
  T* q;                        // [T, H, D], rotated in place, and transformed where keys are rounded
  T* k;                        // [T, KV, D], rotated in place
  const T* v;                  // [T, KV, D]
  S* kv;                       // see kv_storage.cuh
  float* scales;               // null unless S is scaled
  S* origins;                  // [num_blocks, KV, D], null where keys are kept as they are; of a mode in int8
  float* origin_scales;        // [num_blocks, KV], null unless origins are int8
  const float* cos_sin;        // [max_context, rotary_dim]: cosines, then sines
  const long long* positions;  // [T]
  const long long* slots;      // [T]; negative: a padding token, not stored
  const int* block_tables;     // [B, table_stride]
  const int* cu_seqlens;       // [B + 1]
  long long q_stride, k_stride, v_stride;  // elements from token to token
  int num_heads, num_kv_heads, rotary_dim, block_size, num_seqs, table_stride;
  int phase, length;           // length: positions of a dual chunk
};

// Of dual chunk attention (An et al. 2024), where positions begin anew in each chunk: q and k stay as they are.
template <class T, class S>
struct DualStoreArgs : StoreArgs<T, S> {
  T* queries;     // [3, T, H, D]: q for keys of its own chunk, of the one before, and of all before that
  float* shifts;  // [3, T, H]: what scores with these lack for keys that are kept relative to an origin; else null
  int farthest;   // position that a query turns by at most
};
template <class Args>
constexpr bool DUAL = false;
template <class T, class S>
constexpr bool DUAL<DualStoreArgs<T, S>> = true;

// Of a store: all at once, where no token needs the origin that another one of this step makes; or two launches.
constexpr int ALL = 0, ORIGINS = 1, REST = 2;

// The channel at d of a head, rotated; halves of the first rotary_dim channels pair up, as in GPT-NeoX.
template <class T>
__device__ __forceinline__ float rotated(const T* head, int d, float x, const float* cos_sin, int rotary_dim) {
  if (d >= rotary_dim) return x;
  const int half = rotary_dim / 2, angle = d < half ? d : d - half;
  const float other = to_float(head[d < half ? d + half : d - half]), sine = cos_sin[half + angle];
  return x * cos_sin[angle] + (d < half ? -other : other) * sine;
}

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

// What origins are rounded to.
template <class S>
struct OriginOf {
  using Type = S;
};
template <class K, class V>
struct OriginOf<Mode<K, V>> {
  using Type = signed char;
};

// A key that is rounded is kept after a Hadamard transform, and relative to an origin: the first key of its sequence,
// itself rounded, which lies with the sequence's first block.
template <class T, class S, int D>
__device__ __forceinline__ void relate(Head<D>& head, const StoreArgs<T, S>& args, int kv_head, long long token, int lane) {
  using Origin = typename OriginOf<S>::Type;
  const long long block = first_block(args.cu_seqlens, args.num_seqs, args.block_tables, args.table_stride, token);
  const long long at = block * args.num_kv_heads + kv_head;
  Origin* origin = reinterpret_cast<Origin*>(args.origins) + at * D;
  if (args.positions[token] == 0 && args.phase != REST) {
    const float scale = head.template store<Origin>(origin, lane);
    if (SCALED<Origin> && lane == 0) args.origin_scales[at] = scale;
    __syncwarp();
  }
  head.subtract(origin, SCALED<Origin> ? args.origin_scales[at] : 1.f, lane);
}

// A token's key or value into its block's page.
template <class T, class S, int D>
__device__ __forceinline__ void put_in_page(const Head<D>& head, const StoreArgs<T, S>& args, int kv_head, bool is_value,
                                            long long block, int offset, int lane) {
  using Parts = Page<S, D>;
  using Keys = typename Parts::Keys;
  using Values = typename Parts::Values;
  const Parts parts{args.block_size};
  unsigned char* page = reinterpret_cast<unsigned char*>(args.kv) + parts.start(block, kv_head, args.num_kv_heads);
  if (is_value) {
    auto* numbers = reinterpret_cast<typename Values::Number*>(page + parts.value_numbers()) + offset;
    head.template round<Values>(page + parts.values() + offset * Parts::VALUE_BYTES, numbers, args.block_size, lane);
  } else {
    auto* numbers = reinterpret_cast<typename Keys::Number*>(page + parts.key_numbers()) + offset;
    head.template round<Keys>(page + offset * Parts::KEY_BYTES, numbers, args.block_size, lane);
  }
}

// Of a query as it is written: its product with the origin of its sequence, which there is once keys lie in other chunks.
template <class T, class S, int D>
__device__ __forceinline__ float shift_of(Head<D>& head, const StoreArgs<T, S>& args, int kv_head, long long token,
                                          int lane) {
  using Origin = typename OriginOf<S>::Type;
  if (args.positions[token] < args.length) return 0.f;
  const long long block = first_block(args.cu_seqlens, args.num_seqs, args.block_tables, args.table_stride, token);
  const long long at = block * args.num_kv_heads + kv_head;
#pragma unroll
  for (int i = 0; i < Head<D>::PER; ++i)
    head.x[i] = make_float2(to_float(from_float<T>(head.x[i].x)), to_float(from_float<T>(head.x[i].y)));
  return head.dot(reinterpret_cast<const Origin*>(args.origins) + at * D,
                  SCALED<Origin> ? args.origin_scales[at] : 1.f, lane);
}

// In dual chunks: the query of a unit of rope_and_store_dual, and what its scores lack.
template <class T, class S, int D>
__device__ __forceinline__ void put_query(Head<D>& head, const DualStoreArgs<T, S>& args, int unit, long long token,
                                          int lane) {
  const int behind = unit / args.num_heads, at = unit % args.num_heads;
  const long long row = (behind * static_cast<long long>(gridDim.x) + token) * args.num_heads + at;
  head.put(args.queries + row * D, lane);
  if constexpr (RELATED<S>) {
    const float shift = shift_of(head, args, at / (args.num_heads / args.num_kv_heads), token, lane);
    if (lane == 0) args.shifts[row] = shift;
  }
}

// grid (T, (H + 2 KV) / STORE_WARPS rounded up; in dual chunks 3 H), block (32 * STORE_WARPS): a head a warp, two channels a lane.
// check: rope_and_store{, _dual}<__nv_bfloat16, {__nv_bfloat16, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
// check: rope_and_store{, _dual}<__half, {__half, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
// check: rope_and_store{, _dual}<float, {float, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96, 256}> | threads 128 | registers 48 | blocks 10
// check: rope_and_store{_dual, }<{__nv_bfloat16, __half, float}, {kv_int4_affine, kv_int4, kv_int8_affine, kv_fp8_e5m2, kv_mix_i8i4, kv_mix_f843i4, kv_mix_f852i4}, {96, 64, 80, 128}> | threads 128 | registers 64 | blocks 8
// check: rope_and_store{, _dual}<{__nv_bfloat16, __half, float}, {kv_int4_affine, kv_int4, kv_fp8_e5m2, kv_mix_i8i4, kv_mix_f843i4, kv_mix_f852i4}, 256> | threads 128 | registers 64 | blocks 8
template <class T, class S, int D, class Args>
__device__ __forceinline__ void store_head(const Args args) {
  constexpr int PER = Head<D>::PER;
  const int lane = threadIdx.x % 32, unit = blockIdx.y * STORE_WARPS + threadIdx.x / 32;
  const int num_queries = (DUAL<Args> ? 3 : 1) * args.num_heads;
  const bool is_q = unit < num_queries, is_v = unit >= num_queries + args.num_kv_heads;
  if (unit >= num_queries + 2 * args.num_kv_heads) return;
  const int head = is_q ? (DUAL<Args> ? unit % args.num_heads : unit) : (unit - num_queries) % args.num_kv_heads;
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
    long long position = args.positions[token];
    if constexpr (DUAL<Args>) {
      position = static_cast<int>(position) % args.length;
      if (is_q) position = min(static_cast<int>(position) + unit / args.num_heads * args.length, args.farthest);
    }
    const float* cos_sin = args.cos_sin + position * args.rotary_dim;
    x.x[i].x = to_float(from_float<T>(rotated(from, d, x.x[i].x, cos_sin, args.rotary_dim)));
    x.x[i].y = to_float(from_float<T>(rotated(from, d + 1, x.x[i].y, cos_sin, args.rotary_dim)));
  }
  __syncwarp();  // all have read what is now overwritten
  if (RELATED<S> && is_q) x.transform(lane);
  if (!DUAL<Args> && !is_v && args.phase != ORIGINS) {
    T* to = (is_q ? args.q + token * args.q_stride : args.k + token * args.k_stride) + head * D;
    x.put(to, lane);
  }
  if constexpr (DUAL<Args>)
    if (is_q) put_query(x, args, unit, token, lane);
  if (is_q || slot < 0) return;
  if constexpr (RELATED<S>)
    if (!is_v) {
      x.transform(lane);
      relate(x, args, head, token, lane);
    }
  if (Storage<S>::Values::BITS == 4 && is_v) x.transform(lane);
  if (args.phase == ORIGINS) return;

  const long long block = slot >> (__ffs(args.block_size) - 1);  // a power of 2
  if constexpr (IN_PAGES<S>) {
    put_in_page(x, args, head, is_v, block, slot & (args.block_size - 1), lane);
  } else {
    const long long row = cache_row(block, is_v ? args.num_kv_heads + head : head, args.num_kv_heads, args.block_size) +
                          (slot & (args.block_size - 1));
    const float scale = x.template store<S>(args.kv + row * D, lane);
    if (SCALED<S> && lane == 0) args.scales[row] = scale;
  }
}

template <class T, class S, int D>
__global__ void __launch_bounds__(STORE_WARPS * 32) rope_and_store(const StoreArgs<T, S> args) {
  store_head<T, S, D>(args);
}

template <class T, class S, int D>
__global__ void __launch_bounds__(STORE_WARPS * 32) rope_and_store_dual(const DualStoreArgs<T, S> args) {
  store_head<T, S, D>(args);
}
