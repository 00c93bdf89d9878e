// One decode step of the gated delta rule (Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks"), as in Qwen3-Next:
//   S = exp(g) S;   S = S + k (beta (v - S^T k))^T;   out = S^T q
// with q and k normalised to length 1 and q scaled by DK^-0.5. The state is read and written once, from registers.
#include "portable.cuh"

template <class T>
struct DeltaArgs {
  T* out;             // [B, HV, DV]
  const T* q;         // [B, HK, DK], `q_stride` elements from one sequence to the next
  const T* k;         // as q
  const T* v;         // [B, HV, DV]
  const float* g;     // [B, HV], log of the decay
  const float* beta;  // [B, HV]
  float* state;       // [num_slots, HV, DK, DV]
  const int* slots;   // [B]; below 0: no sequence, its out is 0
  long long q_stride, k_stride, v_stride;
  int num_k_heads, num_v_heads;
};

constexpr int DELTA_THREADS = 128, DELTA_COLUMNS = 32;  // columns of the state that a block owns, 4 a thread
constexpr float LENGTH_EPS = 1e-6f;

// The sum over the block's 16 threads with the same columns, known to all of them. `scratch` [4][DELTA_COLUMNS].
__device__ __forceinline__ float4 column_sum(float4 x, float (*scratch)[DELTA_COLUMNS]) {
  float part[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    part[i] += __shfl_xor_sync(FULL_WARP, part[i], 8);
    part[i] += __shfl_xor_sync(FULL_WARP, part[i], 16);
  }
  const int column = threadIdx.x % 8 * 4;
  if (threadIdx.x % 32 < 8)
    *reinterpret_cast<float4*>(&scratch[threadIdx.x / 32][column]) = make_float4(part[0], part[1], part[2], part[3]);
  __syncthreads();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int warp = 0; warp < 4; ++warp) {
    const float4 other = *reinterpret_cast<const float4*>(&scratch[warp][column]);
    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
  }
  return sum;
}

// The vector [DK] in float32, of length `length`, in shared memory; a barrier has to follow before it is read.
template <class T, int DK>
__device__ __forceinline__ void load_unit(float* out, const T* from, float length, float* of_warp) {
  constexpr int SHARE = (DK + DELTA_THREADS - 1) / DELTA_THREADS;
  float held[SHARE], squares = 0.f;
#pragma unroll
  for (int j = 0; j < SHARE; ++j) {
    const int i = threadIdx.x + j * DELTA_THREADS;
    held[j] = i < DK ? to_float(from[i]) : 0.f;
    squares += held[j] * held[j];
  }
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) squares += __shfl_xor_sync(FULL_WARP, squares, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  const float factor = length * rsqrtf(of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3] + LENGTH_EPS);
#pragma unroll
  for (int j = 0; j < SHARE; ++j) {
    const int i = threadIdx.x + j * DELTA_THREADS;
    if (i < DK) out[i] = held[j] * factor;
  }
}

// Grid: (DV / DELTA_COLUMNS, HV, B).
// check: delta_step<{__nv_bfloat16, __half, float}, {128, 64, 256}> | threads 128 | registers 128 | shared 0 | blocks 4
template <class T, int DK>
__global__ void __launch_bounds__(DELTA_THREADS) delta_step(const DeltaArgs<T> args) {
  constexpr int ROWS = DK / 16;  // of the state, a thread's share of its columns
  __shared__ float q[DK], k[DK], of_warp[2][4], scratch[2][4][DELTA_COLUMNS];
  const int num_columns = gridDim.x * DELTA_COLUMNS, column = blockIdx.x * DELTA_COLUMNS + threadIdx.x % 8 * 4;
  const int head = blockIdx.y, k_head = head / (args.num_v_heads / args.num_k_heads), first = threadIdx.x / 8;
  const long long seq = blockIdx.z, of_head = seq * args.num_v_heads + head;
  T* out = args.out + of_head * num_columns + column;
  const int slot = args.slots[seq];
  if (slot < 0) {
    for (int i = threadIdx.x; i < DELTA_COLUMNS; i += DELTA_THREADS)
      args.out[of_head * num_columns + blockIdx.x * DELTA_COLUMNS + i] = from_float<T>(0.f);
    return;
  }
  float* state = args.state + ((static_cast<long long>(slot) * args.num_v_heads + head) * DK + first) * num_columns + column;
  float4 s[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) s[i] = *reinterpret_cast<const float4*>(state + i * 16LL * num_columns);
  load_unit<T, DK>(q, args.q + seq * args.q_stride + k_head * DK, rsqrtf(static_cast<float>(DK)), of_warp[0]);
  load_unit<T, DK>(k, args.k + seq * args.k_stride + k_head * DK, 1.f, of_warp[1]);
  __syncthreads();

  const float decay = ptx::ex2(args.g[of_head] * LOG2E), beta = args.beta[of_head];
  float4 known = make_float4(0.f, 0.f, 0.f, 0.f);  // what the state answers to k
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const float key = k[first + 16 * i];
    s[i].x *= decay, s[i].y *= decay, s[i].z *= decay, s[i].w *= decay;
    known.x += s[i].x * key, known.y += s[i].y * key, known.z += s[i].z * key, known.w += s[i].w * key;
  }
  known = column_sum(known, scratch[0]);
  const T* v = args.v + seq * args.v_stride + static_cast<long long>(head) * num_columns + column;
  const float dx = (to_float(v[0]) - known.x) * beta, dy = (to_float(v[1]) - known.y) * beta;
  const float dz = (to_float(v[2]) - known.z) * beta, dw = (to_float(v[3]) - known.w) * beta;
  float4 answer = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const float key = k[first + 16 * i], query = q[first + 16 * i];
    s[i].x += key * dx, s[i].y += key * dy, s[i].z += key * dz, s[i].w += key * dw;
    answer.x += s[i].x * query, answer.y += s[i].y * query, answer.z += s[i].z * query, answer.w += s[i].w * query;
    *reinterpret_cast<float4*>(state + i * 16LL * num_columns) = s[i];
  }
  answer = column_sum(answer, scratch[1]);
  if (first == 0) {
    out[0] = from_float<T>(answer.x), out[1] = from_float<T>(answer.y);
    out[2] = from_float<T>(answer.z), out[3] = from_float<T>(answer.w);
  }
}
