// Paged attention for sequences of at most DECODE_ROWS rows (see attention.cuh) on tensor cores. Bound by
// memory: every key is read once for all heads of its group and all queries of a verification.
#include "mma_rows.cuh"

template <int D>
struct DecodeRing {
  static constexpr int WARPS = D > 128 ? 2 : 4, STAGES = 2;  // 10 to 35 KB under way: several blocks share an SM
};

// grid (any number, KV, B), block (32 * WARPS). Every warp copies tiles of 16 keys of its own into its own ring of
// STAGES tiles, so nothing in the loop waits for another warp.
// check: paged_decode{, _trees, _dual}<__nv_bfloat16, __nv_bfloat16, {128, 64, 80, 96}> | threads 128 | registers 168 | shared 69632 | blocks 2 | blocks@86,89,120 1
// check: paged_decode{_trees, , _dual}<__half, __half, {128, 64, 80, 96}> | threads 128 | registers 168 | shared 69632 | blocks 2 | blocks@86,89,120 1
// check: paged_decode{_dual, , _trees}<{__nv_bfloat16, __half}, {signed char, __nv_fp8_e4m3}, {128, 64, 80, 96}> | threads 128 | registers 168 | shared 37888 | blocks 2
// check: paged_decode{, _trees}<__nv_bfloat16, __nv_bfloat16, 256> | threads 64 | registers 255 | shared 83968 | blocks 1
// check: paged_decode{_trees, }<__half, __half, 256> | threads 64 | registers 255 | shared 83968 | blocks 1
// check: paged_decode{, _trees}<{__nv_bfloat16, __half}, {signed char, __nv_fp8_e4m3}, 256> | threads 64 | registers 255 | shared 51712 | blocks 3 | blocks@86,89,120 1
// check: paged_decode{, _trees, _dual}<{__nv_bfloat16, __half}, {kv_int4_affine, kv_int4, kv_int8_affine, kv_fp8_e5m2, kv_mix_i8i4, kv_mix_f843i4, kv_mix_f852i4}, {128, 64, 80, 96}> | threads 128 | registers 168 | shared 38912 | blocks 2
// check: paged_decode{, _trees}<{__nv_bfloat16, __half}, {kv_int4_affine, kv_int4, kv_fp8_e5m2, kv_mix_i8i4, kv_mix_f843i4, kv_mix_f852i4}, 256> | threads 64 | registers 255 | shared 52224 | blocks 3 | blocks@86,89,120 1
template <class T, class S, int D, class Args>
__device__ __forceinline__ void decode(const Args& args) {
  using Rows = MmaRows<T, S, D, 16>;
  constexpr int WARPS = DecodeRing<D>::WARPS, STAGES = DecodeRing<D>::STAGES;
  constexpr int STAGE = Rows::Stage::BYTES, STEP = WARPS * 16;
  const Sequence seq = find_sequence(args, blockIdx.z);
  if (seq.num_rows == 0 || seq.num_rows > DECODE_ROWS) return;
  const int kv_head = blockIdx.y, warp = threadIdx.x / 32;
  DYN_SMEM(unsigned char, shared);  // the rings, and once they are drained the results of all warps; then parked q
  constexpr int RINGS = WARPS * STAGES * STAGE, RESULTS = WARPS * 16 * ((D + 8) * 4 + 8);
  unsigned char* ring = shared + warp * STAGES * STAGE;
  unsigned char* park = shared + max(RINGS, RESULTS) + warp * Rows::PARKED_BYTES;
  float* results = reinterpret_cast<float*>(shared);
  float2* sums = reinterpret_cast<float2*>(results + WARPS * 16 * (D + 8));

  Rows rows;
  if constexpr (!DUAL<Args>) rows.load_q(args, seq, kv_head, 0, reinterpret_cast<uint4*>(park));
  const int* table = args.block_tables + static_cast<long long>(blockIdx.z) * args.table_stride;
  const int first_position = seq.context - seq.num_queries;
  Sight sights[2];
  if constexpr (!DUAL<Args>) sights[0] = find_sight(args, seq, rows.g), sights[1] = find_sight(args, seq, rows.g + 8);
  int seen_by_all = first_position + 1, hidden_from_some = first_key(seq.context - 1, args.reach);

  for (int chunk = blockIdx.x; chunk < seq.num_chunks; chunk += gridDim.x) {
    const int chunk_begin = seq.begin + chunk * seq.chunk, chunk_end = min(chunk_begin + seq.chunk, seq.context);
    int last = NONE;  // queries that were turned to
    rows.reset();
#pragma unroll 1
    for (int behind = 0; behind < NUM_QUERIES<Args>; ++behind) {
      int begin = chunk_begin, end = chunk_end;
      if constexpr (DUAL<Args>) {
        const bool in_tree = args.ancestors != nullptr;
        const Common keys = find_common(args, first_position, seq.context - 1, first_position, in_tree, behind);
        begin = max(begin, keys.any_from & ~15), end = min(end, keys.any_to);
        if (begin >= end) continue;
        hidden_from_some = keys.all_from, seen_by_all = keys.all_to;
        rows.turn(args, seq, kv_head, 0, reinterpret_cast<uint4*>(park), behind, last, sights);
      }
      const int num_tiles = (end - begin - warp * 16 + STEP - 1) / STEP;
      auto copy = [&](int tile) {
        const int first = begin + tile * STEP + warp * 16;
        unsigned char* stage = ring + tile % STAGES * STAGE;
        if (first < end)
          copy_tokens<D, 16, 16>(args, kv_head, table[first / args.block_size], first, end, stage, 0);
        ptx::cp_async_commit();
      };
      for (int tile = 0; tile < STAGES - 1; ++tile) copy(tile);
      for (int tile = 0; tile < num_tiles; ++tile) {
        ptx::cp_async_wait<STAGES - 2>();
        __syncwarp();  // what every lane copied is there for all, and all are done with the tile that is overwritten next
        copy(tile + STAGES - 1);
        const unsigned char* stage = ring + tile % STAGES * STAGE;
        const int first = begin + tile * STEP + warp * 16;
        const bool masked = first < hidden_from_some || first + 16 > seen_by_all;
        rows.template attend<TREES<Args>>(stage, first, masked, sights, first_position, args.scale_log2);
      }
      ptx::cp_async_wait<0>();
      if constexpr (DUAL<Args>) __syncwarp();  // all are done with the ring
    }
    if constexpr (DUAL<Args>) rows.shift(args, seq, kv_head, 0, last, 1.f);
    __syncthreads();  // the rings become the results
    rows.spill(results + warp * 16 * (D + 8), sums + warp * 16, args.scale_log2);
    __syncthreads();
    write_rows<D, WARPS, 16>(args, blockIdx.z, seq, kv_head, chunk, 0, seq.num_rows, results, sums, threadIdx.x,
                             WARPS * 32);
    __syncthreads();  // and rings again
  }
}

template <class T, class S, int D>
__global__ void __launch_bounds__(DecodeRing<D>::WARPS * 32, D > 128 ? 4 : 3)
    paged_decode(const AttentionArgs<T, S> args) {
  decode<T, S, D>(args);
}

template <class T, class S, int D>
__global__ void __launch_bounds__(DecodeRing<D>::WARPS * 32, D > 128 ? 4 : 3)
    paged_decode_trees(const TreeArgs<T, S> args) {
  decode<T, S, D>(args);
}

template <class T, class S, int D>
__global__ void __launch_bounds__(DecodeRing<D>::WARPS * 32, D > 128 ? 4 : 3)
    paged_decode_dual(const DualArgs<T, S> args) {
  decode<T, S, D>(args);
}
