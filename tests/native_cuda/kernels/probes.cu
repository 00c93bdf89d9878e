// Small kernels that each show one thing the emulator promises.
#include "portable.cuh"

struct Ints {
  int* out;
  const int* x;
};

// Every kind of collective, one result per lane and kind.
__global__ void collectives(const Ints args) {
  const int lane = threadIdx.x, x = args.x[lane];
  int* out = args.out + lane;
  out[0 * 32] = __shfl_sync(FULL_WARP, x, lane + 1);            // wraps
  out[1 * 32] = __shfl_up_sync(FULL_WARP, x, 4, 8);             // stays within eight lanes
  out[2 * 32] = __shfl_down_sync(FULL_WARP, x, 4, 8);
  out[3 * 32] = __shfl_xor_sync(FULL_WARP, x, 16);
  out[4 * 32] = static_cast<int>(__ballot_sync(FULL_WARP, x % 3 == 0));
  out[5 * 32] = __any_sync(FULL_WARP, x == 31) * 2 + __all_sync(FULL_WARP, x >= 0);
  out[6 * 32] = __popc(__match_any_sync(FULL_WARP, x / 5));
  out[7 * 32] = __reduce_add_sync(FULL_WARP, x);
  out[8 * 32] = __reduce_max_sync(FULL_WARP, x);
  if (lane < 8) out[9 * 32] = __shfl_sync(0xffu, x, 7 - lane);  // a part of the warp
}

// Votes of a block; a counter that all threads of all blocks share; the last block sees what the others wrote.
__global__ void barriers(const Ints args) {
  __shared__ int is_last;
  const int x = args.x[threadIdx.x];
  const int any = __syncthreads_or(x == 5), all = __syncthreads_and(x >= 0), count = __syncthreads_count(x % 2);
  atomicAdd(args.out, x);
  atomicMax(args.out + 1, x);
  __threadfence();
  if (threadIdx.x == 0) is_last = atomicAdd(args.out + 2, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    args.out[3] = any + 2 * all + 4 * count;
    args.out[4] = args.out[0];
  }
}

// What nobody wrote to shared memory, static and dynamic, in the second block too.
__global__ void unwritten(const Ints args) {
  __shared__ int fixed[32];
  DYN_SMEM(int, dynamic);
  int* out = args.out + blockIdx.x * 64 + threadIdx.x;
  out[0] = fixed[threadIdx.x];
  out[32] = dynamic[threadIdx.x];
  __syncthreads();
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 7;
}

// Which block and thread came when.
__global__ void order(const Ints args) {
  const int place = atomicAdd(args.out, 1);
  args.out[1 + place] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void divide(const Ints args) { args.out[threadIdx.x] = args.x[0] / args.x[threadIdx.x]; }

__global__ void deadlock(const Ints args) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 48) __shfl_sync(FULL_WARP, 0, 0);
  args.out[threadIdx.x] = 1;
}

struct Conversions {
  float* out;  // [7, n]
  const float* x;
  int n;
};

template <class T>
__device__ float round_trip(float x) {
  return to_float(from_float<T>(x));
}

__global__ void conversions(const Conversions args) {
  const int i = threadIdx.x, n = args.n;
  if (i >= n) return;
  const float x = args.x[i];
  args.out[0 * n + i] = round_trip<float>(x);
  args.out[1 * n + i] = round_trip<__half>(x);
  args.out[2 * n + i] = round_trip<__nv_bfloat16>(x);
  args.out[3 * n + i] = round_trip<__nv_fp8_e4m3>(x);
  args.out[4 * n + i] = round_trip<__nv_fp8_e5m2>(x);
  args.out[5 * n + i] = round_trip<signed char>(x);
  args.out[6 * n + i] = ptx::ex2(x);
}
