// What the paged attention kernels share: their arguments, which keys a block of threads walks, how results are merged.
//
// The rows of a sequence are its queries times the heads of one KV head's group: row = query * group + head in group.
// A sequence of few rows (a decode, a verification) has its keys cut into chunks, each attended to by itself and merged
// by `merge_chunks` (split-KV, as in Flash-Decoding, Dao et al. 2023). Chunks follow from the sequence alone; the grid
// only decides which block of threads computes which. So a row's result depends neither on the batch around it nor on
// the device, and all that varies from step to step is read from device memory: a captured launch can be replayed.
#pragma once
#include "kv_storage.cuh"

constexpr int CHUNK = 256;       // keys of a chunk, doubled until a sequence has at most MAX_CHUNKS
constexpr int MAX_CHUNKS = 32;
constexpr int SPLIT_ROWS = 64;   // sequences of more rows are not split: they fill the device by themselves
constexpr int DECODE_ROWS = 16;  // sequences of more rows are left to paged_prefill

template <class T, class S>
struct AttentionArgs {
  T* out;                     // [T, H, D]
  const T* q;                 // [T, H, D], tokens q_stride elements apart
  const S* kv;                // see kv_storage.cuh
  const float* scales;        // null unless S is scaled
  float* partial_out;         // [P, H, max_chunks, D]: unnormalised; P tokens of split sequences
  float* partial_sum;         // [P, H, max_chunks, 2]: largest score in powers of 2, sum of the weights
  const int* block_tables;    // [B, table_stride]
  const int* cu_seqlens;      // [B + 1]
  const int* context_lens;    // [B]
  const int* partial_starts;  // [B]: the sequence's first row of P; null where that is its first token
  const int* items;           // [num_items, 2]: sequence and row tile of a block of threads in paged_prefill; null
                              // where every sequence is one tile
  long long q_stride;
  int table_stride, num_kv_heads, group, block_size, max_chunks, window, num_tiles;  // window 0: none
  float scale_log2;           // of the scores, times LOG2E
};

// One sequence of the batch: where its tokens lie, and how its keys [begin, context) are cut.
struct Sequence {
  int first_token, num_queries, num_rows, context, begin, chunk, num_chunks;
};

// First key that the query at a position sees.
__device__ __forceinline__ int first_key(int position, int window) {
  return window > 0 ? max(0, position + 1 - window) : 0;
}

template <class Args>
__device__ __forceinline__ Sequence find_sequence(const Args& args, int index) {
  Sequence seq;
  seq.first_token = args.cu_seqlens[index];
  seq.num_queries = args.cu_seqlens[index + 1] - seq.first_token;
  seq.num_rows = seq.num_queries * args.group;
  seq.context = args.context_lens[index];
  seq.begin = first_key(seq.context - seq.num_queries, args.window) & ~15;
  const int num_keys = max(1, seq.context - seq.begin);
  seq.chunk = seq.num_rows > SPLIT_ROWS ? num_keys : CHUNK;
  while (seq.chunk * MAX_CHUNKS < num_keys) seq.chunk *= 2;
  seq.num_chunks = (num_keys + seq.chunk - 1) / seq.chunk;
  return seq;
}

// Index of (token, head, chunk) among the partial results.
template <class Args>
__device__ __forceinline__ long long partial_row(const Args& args, int seq_index, int query, int head, int chunk) {
  const int start = args.partial_starts ? args.partial_starts[seq_index] : args.cu_seqlens[seq_index];
  const int num_heads = args.num_kv_heads * args.group;
  return (static_cast<long long>(start + query) * num_heads + head) * args.max_chunks + chunk;
}

// A running softmax-weighted sum: o / l, with weights relative to 2^m.
struct Merged {
  float m = NEG_INF, l = 0.f, o = 0.f;

  __device__ __forceinline__ void add(float other_m, float other_l, float other_o) {
    if (other_l == 0.f) return;  // no key was seen
    const float top = fmaxf(m, other_m), mine = ptx::ex2(m - top), theirs = ptx::ex2(other_m - top);
    l = l * mine + other_l * theirs;
    o = o * mine + other_o * theirs;
    m = top;
  }
  __device__ __forceinline__ float mean() const { return l == 0.f ? 0.f : o / l; }  // NaN stays NaN
};

template <class T>
__device__ __forceinline__ void put(T* p, float x) { *p = from_float<T>(x); }

// Merge what PARTS warps found out about rows [first_row, first_row + count) of a sequence and write it: the result
// where the sequence has one chunk, else this chunk's share. In shared memory: o [PARTS][ROWS][D + 8], ml [PARTS][ROWS].
template <int D, int PARTS, int ROWS, class Args>
__device__ __forceinline__ void write_rows(const Args& args, int seq_index, const Sequence& seq, int kv_head, int chunk,
                                           int first_row, int count, const float* o, const float2* ml, int thread,
                                           int num_threads) {
  for (int e = thread; e < count * D; e += num_threads) {
    const int r = e / D, d = e % D, row = first_row + r;
    const int query = row / args.group, head = kv_head * args.group + row % args.group;
    Merged sum;
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      sum.add(ml[p * ROWS + r].x, ml[p * ROWS + r].y, o[(p * ROWS + r) * (D + 8) + d]);
    if (seq.num_chunks == 1) {
      const long long token = seq.first_token + query;
      put(args.out + (token * args.num_kv_heads * args.group + head) * D + d, sum.mean());
    } else {
      const long long at = partial_row(args, seq_index, query, head, chunk);
      args.partial_out[at * D + d] = sum.o;
      if (d == 0) {
        args.partial_sum[at * 2] = sum.m;
        args.partial_sum[at * 2 + 1] = sum.l;
      }
    }
  }
}
