// Sampling's passes over the vocabulary: the most likely token of a row with what its logprobs need, and the top k.
#include "portable.cuh"

constexpr int SELECT_THREADS = 256, PER_THREAD = 16, SELECT_TILE = SELECT_THREADS * PER_THREAD, MAX_K = 1024;

// Order-preserving: larger logits first, then smaller ids; NaN counts as -inf. No logit gives 0, which pads.
__device__ __forceinline__ unsigned long long key_of(float x, unsigned id) {
  const unsigned bits = __float_as_uint(x == x ? x + 0.f : NEG_INF);  // -0 + 0 = 0
  const unsigned order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(order) << 32 | (0xffffffffu - id);
}

__device__ __forceinline__ float value_of(unsigned long long key) {
  const unsigned order = static_cast<unsigned>(key >> 32);
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ unsigned id_of(unsigned long long key) { return 0xffffffffu - static_cast<unsigned>(key); }

// A set of logits: its largest, and the sum of exp(logit - largest).
struct Mass {
  float peak, sum;
};

__device__ __forceinline__ Mass merged(Mass a, Mass b) {
  const float peak = fmaxf(a.peak, b.peak);
  if (peak == NEG_INF) return Mass{NEG_INF, a.sum + b.sum};  // nothing in either, or NaN
  return Mass{peak, a.sum * ptx::ex2((a.peak - peak) * LOG2E) + b.sum * ptx::ex2((b.peak - peak) * LOG2E)};
}

// The largest key and the merged mass of COUNT lanes, a power of 2, in the first one.
template <int COUNT>
__device__ __forceinline__ void reduce_lanes(unsigned long long& key, Mass& mass) {
#pragma unroll
  for (int offset = COUNT / 2; offset; offset >>= 1) {
    const unsigned long long other = __shfl_down_sync(FULL_WARP, key, offset);
    if (other > key) key = other;
    const float peak = __shfl_down_sync(FULL_WARP, mass.peak, offset);
    mass = merged(mass, Mass{peak, __shfl_down_sync(FULL_WARP, mass.sum, offset)});
  }
}

// The same of the block, in thread 0.
__device__ __forceinline__ void reduce_block(unsigned long long& key, Mass& mass) {
  constexpr int WARPS = SELECT_THREADS / 32;
  __shared__ unsigned long long keys[WARPS];
  __shared__ Mass masses[WARPS];
  const int lane = threadIdx.x % 32;
  reduce_lanes<32>(key, mass);
  if (lane == 0) {
    keys[threadIdx.x / 32] = key;
    masses[threadIdx.x / 32] = mass;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  key = keys[lane % WARPS];
  mass = masses[lane % WARPS];
  reduce_lanes<WARPS>(key, mass);
}

struct PeakArgs {
  const float* logits;  // [R, width], rows `stride` elements apart
  long long* keys;      // [R, tiles]
  float* masses;        // [R, tiles, 2]
  long long stride;
  int width;
};

// Grid: (tiles, R).
// check: tile_peaks | threads 256 | registers 48 | shared 0 | blocks 4
__global__ void __launch_bounds__(SELECT_THREADS) tile_peaks(const PeakArgs args) {
  const float* row = args.logits + blockIdx.y * args.stride;
  float held[PER_THREAD];
  unsigned long long key = 0;
  Mass mass{NEG_INF, 0.f};
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int id = blockIdx.x * SELECT_TILE + i * SELECT_THREADS + threadIdx.x;
    held[i] = id < args.width ? row[id] : NEG_INF;
    mass.peak = fmaxf(mass.peak, held[i]);
    const unsigned long long other = id < args.width ? key_of(held[i], id) : 0;
    if (other > key) key = other;
  }
  const float base = mass.peak == NEG_INF ? 0.f : mass.peak;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) mass.sum += ptx::ex2((held[i] - base) * LOG2E);
  reduce_block(key, mass);
  if (threadIdx.x) return;
  const long long tile = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
  args.keys[tile] = static_cast<long long>(key);
  args.masses[2 * tile] = mass.peak;
  args.masses[2 * tile + 1] = mass.sum;
}

struct PeakMergeArgs {
  const long long* keys;  // [R, tiles]
  const float* masses;    // [R, tiles, 2]
  long long* ids;         // [R]: the first of the largest
  float* peaks;           // [R]: its logit
  float* log_sums;        // [R]: log of the sum of exp of all logits; NaN where one is
  int tiles;
};

// Grid: (R).
// check: merge_peaks | threads 256 | registers 48 | shared 0 | blocks 4
__global__ void __launch_bounds__(SELECT_THREADS) merge_peaks(const PeakMergeArgs args) {
  const long long first = static_cast<long long>(blockIdx.x) * args.tiles;
  unsigned long long key = 0;
  Mass mass{NEG_INF, 0.f};
  for (int tile = threadIdx.x; tile < args.tiles; tile += SELECT_THREADS) {
    const unsigned long long other = static_cast<unsigned long long>(args.keys[first + tile]);
    if (other > key) key = other;
    mass = merged(mass, Mass{args.masses[2 * (first + tile)], args.masses[2 * (first + tile) + 1]});
  }
  reduce_block(key, mass);
  if (threadIdx.x) return;
  args.ids[blockIdx.x] = id_of(key);
  args.peaks[blockIdx.x] = value_of(key);
  args.log_sums[blockIdx.x] = mass.peak + logf(mass.sum);
}

struct TopArgs {
  const float* logits;   // [R, width], rows `stride` elements apart, in the first pass
  const long long* keys;  // [R, width], in later passes
  long long* to;         // [R, tiles, k] keys, unordered, but in the last pass
  float* values;         // [R, k], largest first, equal ones by id, in the last pass
  long long* ids;        // [R, k], in the last pass
  long long stride;
  int width, k;
};

// What of the block's keys are the k largest: those >= the result. By radix select, 8 bits a round (Alabi et al. 2012).
__device__ __forceinline__ unsigned long long threshold(const unsigned long long (&keys)[PER_THREAD], int k) {
  __shared__ int histogram[256], chosen, above;
  unsigned long long prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
      if (keys[i] && ((keys[i] ^ prefix) >> shift >> 8) == 0)
        atomicAdd(&histogram[static_cast<int>(keys[i] >> shift) & 255], 1);
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l has the bins 255 - 8 l and the 7 below
      const int top = 255 - 8 * static_cast<int>(threadIdx.x);
      int own = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) own += histogram[top - i];
      int upto = own;
#pragma unroll
      for (int offset = 1; offset < 32; offset <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, upto, offset);
        if (static_cast<int>(threadIdx.x) >= offset) upto += other;
      }
      int passed = upto - own, bin = top;
      if (passed < k && k <= upto) {
        while (passed + histogram[bin] < k) passed += histogram[bin--];
        chosen = bin;
        above = passed;
      }
    }
    __syncthreads();
    k -= above;
    prefix |= static_cast<unsigned long long>(chosen) << shift;
    if (histogram[chosen] == k) break;  // all of the bin: the digits below do not matter
    __syncthreads();
  }
  return prefix;
}

// Descending, by bitonic sort (Batcher 1968); num is a power of 2.
__device__ __forceinline__ void sort_block(unsigned long long* keys, int num) {
  for (int run = 2; run <= num; run <<= 1)
    for (int step = run / 2; step; step >>= 1) {
      __syncthreads();
      for (int i = threadIdx.x; i < num; i += SELECT_THREADS) {
        const int j = i ^ step;
        if (j <= i || (keys[i] > keys[j]) == ((i & run) == 0)) continue;
        const unsigned long long key = keys[i];
        keys[i] = keys[j];
        keys[j] = key;
      }
    }
  __syncthreads();
}

// Grid: (tiles, R). Passes follow each other until a row is one tile, which the last pass sorts; 1 <= k <= MAX_K.
// check: top_k<{true, false}, {true, false}> | threads 256 | registers 80 | shared 0 | blocks 2
template <bool FIRST, bool LAST>
__global__ void __launch_bounds__(SELECT_THREADS) top_k(const TopArgs args) {
  __shared__ unsigned long long best[MAX_K];
  __shared__ int num_best;
  const long long row = blockIdx.y;
  unsigned long long keys[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int id = blockIdx.x * SELECT_TILE + i * SELECT_THREADS + threadIdx.x;
    keys[i] = 0;
    if (id >= args.width) continue;
    if constexpr (FIRST)
      keys[i] = key_of(args.logits[row * args.stride + id], id);
    else
      keys[i] = static_cast<unsigned long long>(args.keys[row * args.width + id]);
  }
  int num_keys = 0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) num_keys += __syncthreads_count(keys[i] != 0);
  int size = 2;  // what is sorted, a power of 2
  while (size < args.k) size <<= 1;
  for (int i = threadIdx.x; i < size; i += SELECT_THREADS) best[i] = 0;
  if (threadIdx.x == 0) num_best = 0;
  const unsigned long long least = num_keys <= args.k ? 1 : threshold(keys, args.k);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i)
    if (keys[i] && keys[i] >= least) best[atomicAdd(&num_best, 1)] = keys[i];
  __syncthreads();
  if constexpr (LAST) sort_block(best, size);
  for (int i = threadIdx.x; i < args.k; i += SELECT_THREADS) {
    if constexpr (LAST) {
      args.values[row * args.k + i] = value_of(best[i]);
      args.ids[row * args.k + i] = id_of(best[i]);
    } else {
      args.to[(row * gridDim.x + blockIdx.x) * args.k + i] = static_cast<long long>(best[i]);
    }
  }
}
