// The merge of what split sequences got chunk by chunk.
#include "attention.cuh"

// grid (H, B), block (D).
// check: merge_chunks<{__nv_bfloat16, __half, float}, signed char, {256, 64, 80, 96, 128}> | threads 256 | registers 40 | blocks 6
template <class T, class S, int D>
__global__ void __launch_bounds__(D) merge_chunks(const AttentionArgs<T, S> args) {
  const Sequence seq = find_sequence(args, blockIdx.y);
  if (seq.num_chunks == 1) return;
  const int head = blockIdx.x, d = threadIdx.x;
  for (int query = 0; query < seq.num_queries; ++query) {
    const long long at = partial_row(args, blockIdx.y, query, head, 0);
    Merged sum;
    for (int chunk = 0; chunk < seq.num_chunks; ++chunk) {
      const float* ml = args.partial_sum + (at + chunk) * 2;
      sum.add(ml[0], ml[1], args.partial_out[(at + chunk) * D + d]);
    }
    put(args.out + ((seq.first_token + query) * static_cast<long long>(gridDim.x) + head) * D + d, sum.mean());
  }
}
