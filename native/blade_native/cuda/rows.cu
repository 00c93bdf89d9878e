// Ops on rows of activations: RMS norm (Zhang & Sennrich 2019), alone and after adding to the residual, and SwiGLU's
// gate (Shazeer 2020). 16 bytes a load, float32 inside; what a row's result is follows from its width alone.
#include "portable.cuh"

template <class T>
constexpr int PER_VECTOR = 16 / sizeof(T);
constexpr int HELD = 4;  // vectors of a row that a thread keeps in registers

template <class T, int N>
__device__ __forceinline__ uint4 packed(const float (&f)[N]) {
  uint4 v;
  T* p = reinterpret_cast<T*>(&v);
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = from_float<T>(f[i]);
  return v;
}

// The sum over LANES neighbouring lanes of a warp, or over the block with LANES = 0, known to all of them.
template <int LANES>
__device__ __forceinline__ float team_sum(float x) {
  constexpr int WIDTH = LANES ? LANES : 32;
#pragma unroll
  for (int offset = WIDTH / 2; offset; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
  if constexpr (LANES == 0) {
    __shared__ float of_warp[32];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) x += of_warp[warp];
  }
  return x;
}

template <class T>
struct NormArgs {
  T* y;                 // [outer, inner, width]
  const T* x;           // [outer, inner, width], `stride` elements from one outer to the next
  T* residual;          // as y: becomes residual + x
  const T* weight;      // [width]
  long long stride;
  int outer, inner, width;
  float eps;
};

// LANES threads share a row, the whole block does with LANES = 0; width <= HELD * 16 bytes for each of them.
template <class T, int LANES, bool ADD>
__device__ __forceinline__ void norm_row(const NormArgs<T>& args) {
  constexpr int N = PER_VECTOR<T>;
  const int team = LANES ? LANES : blockDim.x, member = threadIdx.x % team;
  const long long row = static_cast<long long>(blockIdx.x) * (blockDim.x / team) + threadIdx.x / team;
  const bool valid = row < static_cast<long long>(args.outer) * args.inner;
  const int num_vectors = valid ? args.width / N : 0;
  const T* x = args.x + row / args.inner * args.stride + row % args.inner * args.width;
  float held[HELD][N], squares = 0.f;
#pragma unroll
  for (int h = 0; h < HELD; ++h) {
    const int i = member + h * team;
    if (i >= num_vectors) continue;
    unpack<T>(reinterpret_cast<const uint4*>(x)[i], held[h]);
    if constexpr (ADD) {
      uint4* residual = reinterpret_cast<uint4*>(args.residual + row * args.width) + i;
      float other[N];
      unpack<T>(*residual, other);
#pragma unroll
      for (int j = 0; j < N; ++j) held[h][j] += other[j];
      *residual = packed<T>(held[h]);
      unpack<T>(*residual, held[h]);  // the sum lives on as it was rounded
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares += held[h][j] * held[h][j];
  }
  const float factor = rsqrtf(team_sum<LANES>(squares) / args.width + args.eps);
#pragma unroll
  for (int h = 0; h < HELD; ++h) {
    const int i = member + h * team;
    if (i >= num_vectors) continue;
    float weight[N];
    unpack<T>(reinterpret_cast<const uint4*>(args.weight)[i], weight);
#pragma unroll
    for (int j = 0; j < N; ++j) held[h][j] *= factor * weight[j];
    reinterpret_cast<uint4*>(args.y + row * args.width)[i] = packed<T>(held[h]);
  }
}

// check: rms_norm<{__nv_bfloat16, __half, float}, {0, 8, 32}> | threads 1024 | registers 64 | shared 0 | blocks 1
template <class T, int LANES>
__global__ void __launch_bounds__(1024) rms_norm(const NormArgs<T> args) {
  norm_row<T, LANES, false>(args);
}

// check: add_rms_norm<{__nv_bfloat16, __half, float}> | threads 1024 | registers 64 | shared 0 | blocks 1
template <class T>
__global__ void __launch_bounds__(1024) add_rms_norm(const NormArgs<T> args) {
  norm_row<T, 0, true>(args);
}

template <class T>
struct GateArgs {
  T* y;              // [rows, width]
  const T* gate_up;  // [rows, 2, width]
  int width;
};

// Grid: (rows, blocks of 256 vectors of a row).
// check: silu_mul<{__nv_bfloat16, __half, float}> | threads 256 | registers 48 | shared 0 | blocks 4
template <class T>
__global__ void __launch_bounds__(256) silu_mul(const GateArgs<T> args) {
  constexpr int N = PER_VECTOR<T>;
  const int num_vectors = args.width / N, i = blockIdx.y * 256 + threadIdx.x;
  if (i >= num_vectors) return;
  const long long row = blockIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(args.gate_up) + row * 2 * num_vectors + i;
  float gate[N], up[N];
  unpack<T>(from[0], gate);
  unpack<T>(from[num_vectors], up);
#pragma unroll
  for (int j = 0; j < N; ++j) gate[j] *= up[j] / (1.f + ptx::ex2(-LOG2E * gate[j]));
  reinterpret_cast<uint4*>(args.y)[row * num_vectors + i] = packed<T>(gate);
}
