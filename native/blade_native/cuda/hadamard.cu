// What attention gets from values that are kept after a Hadamard transform (see kv_store.cu), taken back.
#include "head.cuh"

constexpr int HADAMARD_WARPS = 4;

template <class T>
struct HadamardArgs {
  T* x;  // [num_heads, D]
  int num_heads;
};

// grid (num_heads / HADAMARD_WARPS rounded up), block (32 * HADAMARD_WARPS): a head a warp, two channels a lane.
// check: hadamard<{__nv_bfloat16, __half, float}, {256, 64, 80, 96, 128}> | threads 128 | registers 32 | blocks 12
template <class T, int D>
__global__ void __launch_bounds__(HADAMARD_WARPS * 32) hadamard(const HadamardArgs<T> args) {
  const int lane = threadIdx.x % 32, head = blockIdx.x * HADAMARD_WARPS + threadIdx.x / 32;
  if (head >= args.num_heads) return;
  Head<D> x;
  x.load(args.x + static_cast<long long>(head) * D, lane);
  x.transform(lane);
  x.put(args.x + static_cast<long long>(head) * D, lane);
}
