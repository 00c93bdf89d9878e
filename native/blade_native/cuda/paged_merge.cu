// The merge of what split sequences got chunk by chunk.
#include "attention.cuh"

constexpr int MERGE_WARPS = 4;

// grid (H / MERGE_WARPS rounded up, B), block (32 * MERGE_WARPS): a head a warp. All loads of a row are under way at
// once: a lane holds a chunk's weight first, and four channels of all chunks then.
// check: merge_chunks<{__nv_bfloat16, __half, float}, signed char, {256, 64, 80, 96, 128}> | threads 128 | registers 64 | blocks 8
template <class T, class S, int D>
__global__ void __launch_bounds__(MERGE_WARPS * 32) merge_chunks(const AttentionArgs<T, S> args) {
  static_assert(MAX_CHUNKS == 32, "a lane for each");
  const Sequence seq = find_sequence(args, blockIdx.y);
  const int lane = threadIdx.x % 32, head = blockIdx.x * MERGE_WARPS + threadIdx.x / 32;
  const int num_heads = args.num_kv_heads * args.group;
  if (seq.num_chunks == 1 || head >= num_heads) return;
  for (int query = 0; query < seq.num_queries; ++query) {
    const long long at = partial_row(args, blockIdx.y, query, head, 0);
    float2 part = make_float2(NEG_INF, 0.f);
    if (lane < seq.num_chunks) part = *reinterpret_cast<const float2*>(args.partial_sum + (at + lane) * 2);
    float top = part.x;
    for (int other = 16; other; other /= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, other));
    const float weight = part_weight(part.x, part.y, top);
    float l = part.y * weight;
    for (int other = 16; other; other /= 2) l += __shfl_xor_sync(FULL_WARP, l, other);
    const long long token = seq.first_token + query;
#pragma unroll
    for (int first = 0; first < D; first += 128) {
      const int d = first + lane * 4;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
      for (int chunk = 0; chunk < seq.num_chunks; ++chunk) {
        const float by = __shfl_sync(FULL_WARP, weight, chunk);
        if (d < D) add_scaled(sum, *reinterpret_cast<const float4*>(args.partial_out + (at + chunk) * D + d), by);
      }
      if (d < D) put_mean(args.out + (token * num_heads + head) * D + d, sum, l);
    }
  }
}
