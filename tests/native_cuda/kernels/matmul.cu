// c[M, N] = a[M, K] b[K, N], 16 x 16 of c per block of two warps: a ring of asynchronous copies that both warps share,
// ldmatrix, mma.sync, and an epilogue through static shared memory. Small enough to break in every way.
#include "portable.cuh"

template <class T>
struct MatmulArgs {
  float* c;
  const T* a;
  const T* b;
  int n, k;
};

// check: matmul<{__half, __nv_bfloat16}, 3> | threads 64 | registers 40 | shared 3072 | blocks 16
template <class T, int STAGES>
__global__ void __launch_bounds__(64) matmul(const MatmulArgs<T> args) {
  DYN_SMEM(T, ring);                    // [STAGES][a, b][16][16], 16-byte halves of a row swapped by row
  __shared__ float tile[16][16 + 1];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int m0 = blockIdx.y * 16, n0 = blockIdx.x * 16, steps = args.k / 16;
  const auto place = [](int row, int half) { return row * 16 + (half ^ (row >> 2 & 1)) * 8; };
  const auto load = [&](int step) {     // one 16-byte copy per thread: the first warp's are of a, the second's of b
    const int row = lane / 2, half = lane % 2;
    T* target = ring + (step % STAGES * 2 + warp) * 256 + place(row, half);
    const T* source = warp ? args.b + (step * 16 + row) * args.n + n0 + half * 8
                           : args.a + (m0 + row) * args.k + step * 16 + half * 8;
    if (step < steps) ptx::cp_async16(target, source);
    ptx::cp_async_commit();
  };
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  for (int step = 0; step < STAGES - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the copies of all are there, and the place of the step before is free
    load(step + STAGES - 1);
    const T* stage = ring + step % STAGES * 512;
    unsigned a[4], b[4];
    ptx::ldmatrix_x4<false>(a, stage + place(lane % 16, lane / 16));
    ptx::ldmatrix_x4<true>(b, stage + 256 + place(lane % 16, lane / 16));
    ptx::mma16816<T>(sum, a, b[warp * 2], b[warp * 2 + 1]);
  }
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) tile[lane / 4 + i / 2 * 8][warp * 8 + lane % 4 * 2 + i % 2] = sum[i];
  __syncthreads();  // the tile is whole
  for (int i = thread; i < 256; i += 64) args.c[(m0 + i / 16) * args.n + n0 + i % 16] = tile[i / 16][i % 16];
}
