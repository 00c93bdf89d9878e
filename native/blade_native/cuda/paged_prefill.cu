// Paged attention for sequences of more than DECODE_ROWS rows (see attention.cuh) on tensor cores: chunks of prompts,
// causal within the chunk and over all that is cached before it, and long verifications.
#include "mma_rows.cuh"

template <class S, int D>
struct PrefillRing {
  static constexpr int WARPS = 4, KEYS = D > 128 ? 16 : sizeof(S) == 1 ? 32 : 64;
  static constexpr int STAGES = KEYS == 64 ? 2 : 3;
};

// grid (num_items, KV, any number), block (32 * WARPS): 16 rows a warp, whose keys the block shares in a ring of STAGES
// stages of KEYS. Items name a sequence and which 16 * WARPS of its rows; the last ones have the most keys: they come
// first, so that no long item starts late.
// check: paged_prefill{, _trees, _dual}<__nv_bfloat16, __nv_bfloat16, {128, 64, 80, 96}> | threads 128 | registers 255 | shared 69632 | blocks 2 | blocks@86,89,120 1
// check: paged_prefill{_trees, , _dual}<__half, __half, {128, 64, 80, 96}> | threads 128 | registers 255 | shared 69632 | blocks 2 | blocks@86,89,120 1
// check: paged_prefill{_dual, , _trees}<{__nv_bfloat16, __half}, {signed char, __nv_fp8_e4m3}, {128, 64, 80, 96}> | threads 128 | registers 255 | shared 35328 | blocks 2
// check: paged_prefill{, _trees}<__nv_bfloat16, __nv_bfloat16, 256> | threads 128 | registers 255 | shared 100864 | blocks 1
// check: paged_prefill{_trees, }<__half, __half, 256> | threads 128 | registers 255 | shared 100864 | blocks 1
// check: paged_prefill{, _trees}<{__nv_bfloat16, __half}, {signed char, __nv_fp8_e4m3}, 256> | threads 128 | registers 255 | shared 100864 | blocks 1
// check: paged_prefill{, _trees, _dual}<{__nv_bfloat16, __half}, {kv_int4_affine, kv_int4, kv_int8_affine, kv_fp8_e5m2, kv_mix_i8i4, kv_mix_f843i4, kv_mix_f852i4}, {128, 64, 80, 96}> | threads 128 | registers 255 | shared 35328 | blocks 2
// check: paged_prefill{, _trees}<{__nv_bfloat16, __half}, {kv_int4_affine, kv_int4, kv_fp8_e5m2, kv_mix_i8i4, kv_mix_f843i4, kv_mix_f852i4}, 256> | threads 128 | registers 255 | shared 100864 | blocks 1
template <class T, class S, int D, class Args>
__device__ __forceinline__ void prefill(const Args& args) {
  constexpr int WARPS = PrefillRing<S, D>::WARPS, KEYS = PrefillRing<S, D>::KEYS, STAGES = PrefillRing<S, D>::STAGES;
  using Rows = MmaRows<T, S, D, KEYS>;
  constexpr int STAGE = Rows::Stage::BYTES, SHARE = KEYS / WARPS;  // tokens that a warp copies
  static_assert(16 % SHARE == 0, "a warp's tokens lie in one block");
  const int seq_index = args.items ? args.items[blockIdx.x * 2] : blockIdx.x;
  const Sequence seq = find_sequence(args, seq_index);
  if (seq.num_rows <= DECODE_ROWS) return;
  const int kv_head = blockIdx.y, warp = threadIdx.x / 32;
  const int block_row = (args.items ? args.items[blockIdx.x * 2 + 1] : 0) * WARPS * 16;
  const int first_row = block_row + warp * 16;
  DYN_SMEM(unsigned char, shared);  // the ring, and once it is drained every warp's result; then parked q
  constexpr int RING = STAGES * STAGE, RESULT = 16 * ((D + 8) * 4 + 8);
  unsigned char* park = shared + max(RING, WARPS * RESULT) + warp * Rows::PARKED_BYTES;
  float* result = reinterpret_cast<float*>(shared + warp * RESULT);
  float2* sums = reinterpret_cast<float2*>(result + 16 * (D + 8));

  Rows rows;
  if constexpr (!DUAL<Args>) rows.load_q(args, seq, kv_head, first_row, reinterpret_cast<uint4*>(park));
  const int* table = args.block_tables + static_cast<long long>(seq_index) * args.table_stride;
  const int first_position = seq.context - seq.num_queries;
  auto position = [&](int row) { return first_position + min(row, seq.num_rows - 1) / args.group; };
  Sight sights[2];
  if constexpr (!DUAL<Args>)
    sights[0] = find_sight(args, seq, first_row + rows.g), sights[1] = find_sight(args, seq, first_row + rows.g + 8);
  bool in_tree = false;  // then any row's position may be as low as that of the step's first token
  if constexpr (DUAL<Args>)
    in_tree = args.ancestors && args.ancestors[seq.first_token + seq.num_queries - 1] != 0;
  else if constexpr (TREES<Args>)
    in_tree = args.ancestors[seq.first_token + seq.num_queries - 1] != 0;
  auto lowest = [&](int row) { return in_tree ? first_position : position(row); };
  // Keys seen by the block's rows, by any of the warp's, by all of the warp's.
  int block_from = first_key(lowest(block_row), args.reach) & ~15;
  int block_to = position(block_row + WARPS * 16 - 1) + 1;
  int any_from = first_key(lowest(first_row), args.reach), any_to = position(first_row + 15) + 1;
  int all_from = first_key(position(first_row + 15), args.reach), all_to = lowest(first_row) + 1;
  const int num_rows = min(16, seq.num_rows - first_row);  // maybe none

  for (int chunk = blockIdx.z; chunk < seq.num_chunks; chunk += gridDim.z) {
    int last = NONE;  // queries that were turned to
    rows.reset();
#pragma unroll 1
    for (int behind = 0; behind < NUM_QUERIES<Args>; ++behind) {
      if constexpr (DUAL<Args>) {
        auto common = [&](int row, int num) {
          return find_common(args, lowest(row), position(row + num - 1), first_position, in_tree, behind);
        };
        const Common of_block = common(block_row, WARPS * 16), of_warp = common(first_row, 16);
        block_from = of_block.any_from & ~15, block_to = of_block.any_to;
        any_from = of_warp.any_from, any_to = of_warp.any_to;
        all_from = of_warp.all_from, all_to = of_warp.all_to;
      }
      const int begin = max(block_from, seq.begin + chunk * seq.chunk);
      const int end = min(block_to, min(seq.begin + (chunk + 1) * seq.chunk, seq.context));
      if constexpr (DUAL<Args>) {
        if (begin >= end) continue;
        rows.turn(args, seq, kv_head, first_row, reinterpret_cast<uint4*>(park), behind, last, sights);
      }
      const int num_tiles = (end - begin + KEYS - 1) / KEYS;
      auto copy = [&](int tile) {
        const int first = begin + tile * KEYS + warp * SHARE;
        unsigned char* stage = shared + tile % STAGES * STAGE;
        if (tile < num_tiles) {
          const int block = first < end ? table[first / args.block_size] : 0;
          copy_tokens<D, KEYS, SHARE>(args, kv_head, block, first, end, stage, warp * SHARE);
        }
        ptx::cp_async_commit();
      };
      for (int tile = 0; tile < STAGES - 1; ++tile) copy(tile);
      for (int tile = 0; tile < num_tiles; ++tile) {
        ptx::cp_async_wait<STAGES - 2>();
        __syncthreads();  // what all copied is there for all, and all are done with the stage that is overwritten next
        copy(tile + STAGES - 1);
        const unsigned char* stage = shared + tile % STAGES * STAGE;
        const int first = begin + tile * KEYS;
        if (first >= any_to || first + KEYS <= any_from || num_rows <= 0) continue;
        const bool masked = first < all_from || first + KEYS > min(all_to, end);
        rows.template attend<TREES<Args>>(stage, first, masked, sights, first_position, args.scale_log2);
      }
      ptx::cp_async_wait<0>();
      __syncthreads();  // the ring becomes the results
    }
    if constexpr (DUAL<Args>) rows.shift(args, seq, kv_head, first_row, last, 1.f);
    rows.spill(result, sums, args.scale_log2);
    __syncwarp();
    write_rows<D, 1, 16>(args, seq_index, seq, kv_head, chunk, first_row, num_rows, result, sums, threadIdx.x % 32, 32);
    __syncthreads();  // and a ring again
  }
}

template <class T, class S, int D>
__global__ void __launch_bounds__(PrefillRing<S, D>::WARPS * 32, 2) paged_prefill(const AttentionArgs<T, S> args) {
  prefill<T, S, D>(args);
}

template <class T, class S, int D>
__global__ void __launch_bounds__(PrefillRing<S, D>::WARPS * 32, 2) paged_prefill_trees(const TreeArgs<T, S> args) {
  prefill<T, S, D>(args);
}

template <class T, class S, int D>
__global__ void __launch_bounds__(PrefillRing<S, D>::WARPS * 32, 2) paged_prefill_dual(const DualArgs<T, S> args) {
  prefill<T, S, D>(args);
}
