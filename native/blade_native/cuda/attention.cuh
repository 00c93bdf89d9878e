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
  int table_stride, num_kv_heads, group, block_size, max_chunks, reach, num_tiles;  // reach: see first_key
  float scale_log2;           // of the scores, times LOG2E
};

// Of a step with drafts that are trees (Miao et al. 2024, "SpecInfer"). In a type of its own: more than 128 bytes of
// arguments would change the machine code of all other steps.
template <class T, class S>
struct TreeArgs : AttentionArgs<T, S> {
  const long long* ancestors;  // [T]: which of the tokens of its sequence's step a token sees, bit i the i-th; its own
                               // is the highest. 0: a token of no tree
};

// Of dual chunk attention (An et al. 2024): each query is there three times, for keys of its own chunk of positions, of
// the one before it, and of all before that. `reach` is 0; `ancestors` is null where there is no tree.
template <class T, class S>
struct DualArgs : TreeArgs<T, S> {  // q [3, T, H, D], side by side
  const float* shifts;  // [3, T, H]: what scores with q lack for keys that are kept relative to an origin; else null
  long long behind;     // T * H: heads from a query to the next of its three
  int length;           // positions of a chunk
};

template <class Args>
constexpr bool TREES = false;
template <class T, class S>
constexpr bool TREES<TreeArgs<T, S>> = true;
template <class T, class S>
constexpr bool TREES<DualArgs<T, S>> = true;
template <class Args>
constexpr bool DUAL = false;
template <class T, class S>
constexpr bool DUAL<DualArgs<T, S>> = true;
template <class Args>
constexpr int NUM_QUERIES = DUAL<Args> ? 3 : 1;  // that a row has
constexpr int NONE = -1;                              // of them

// One sequence of the batch: where its tokens lie, and how its keys [begin, context) are cut.
struct Sequence {
  int first_token, num_queries, num_rows, context, begin, chunk, num_chunks;
};

// First key that the query at a position sees: of the last `reach` ones; below 0 of its own chunk of -reach positions.
__device__ __forceinline__ int first_key(int position, int reach) {
  if (reach < 0) return position - position % -reach;
  return reach > 0 ? max(0, position + 1 - reach) : 0;
}

template <class Args>
__device__ __forceinline__ Sequence find_sequence(const Args& args, int index) {
  Sequence seq;
  seq.first_token = args.cu_seqlens[index];
  seq.num_queries = args.cu_seqlens[index + 1] - seq.first_token;
  seq.num_rows = seq.num_queries * args.group;
  seq.context = args.context_lens[index];
  seq.begin = first_key(seq.context - seq.num_queries, args.reach) & ~15;
  const int num_keys = max(1, seq.context - seq.begin);
  seq.chunk = seq.num_rows > SPLIT_ROWS ? num_keys : CHUNK;
  while (seq.chunk * MAX_CHUNKS < num_keys) seq.chunk *= 2;
  seq.num_chunks = (num_keys + seq.chunk - 1) / seq.chunk;
  return seq;
}

// What a row sees: keys [from, to), and in a tree those of the step's own keys whose bits are set in `path`. There a key
// lies where its turn in the step puts it, at its position or behind. Windows and chunks go by positions, and a token's
// follows from the number of its ancestors, which come in their order.
struct Sight {
  int from, to;
  unsigned long long path;
};

template <class Args>
__device__ __forceinline__ Sight find_sight(const Args& args, const Sequence& seq, int row) {
  const int start = seq.context - seq.num_queries, query = row / args.group;
  const Sight plain = {first_key(start + query, args.reach), row < seq.num_rows ? start + query + 1 : 0, 0};
  if constexpr (TREES<Args>) {
    unsigned long long path = row < seq.num_rows ? args.ancestors[seq.first_token + query] : 0;
    if (path == 0) return plain;
    const int from = first_key(start + __popcll(path) - 1, args.reach);
    for (int position = start; position < from; ++position) path &= path - 1;
    return {from, start, path};
  }
  return plain;
}

// Positions [from, to).
struct Span {
  int from, to;
};

// Of the keys that the query at a position sees those `behind` chunks before its own, 2: all before these. Both ends
// rise with the position.
__device__ __forceinline__ Span find_span(int position, int length, int behind) {
  const int own = position - position % length, before = max(own - length, 0);
  if (behind == 0) return {own, position + 1};
  return behind == 1 ? Span{before, own} : Span{0, before};
}

// What a row sees of them; where its path lies follows from the path alone, as the step's first key is at `start`.
template <class Args>
__device__ __forceinline__ Sight find_sight(const Args& args, const Sequence& seq, int row, int behind) {
  if (row >= seq.num_rows) return {0, 0, 0};
  const int start = seq.context - seq.num_queries, query = row / args.group;
  unsigned long long path = args.ancestors ? args.ancestors[seq.first_token + query] : 0, seen = 0;
  const Span span = find_span(start + (path ? __popcll(path) - 1 : query), args.length, behind);
  if (path == 0) return {span.from, span.to, 0};
  for (int position = start; path; ++position, path &= path - 1)
    if (position >= span.from && position < span.to) seen |= path & -path;
  return {span.from, min(span.to, start), seen};
}

// Of rows whose queries' positions are from `low` to `high`: keys [any_from, any_to) are seen by any of them, those in
// [all_from, all_to) by all. In a tree whose keys are at `start` and behind a key may lie after its position.
struct Common {
  int any_from, any_to, all_from, all_to;
};

template <class Args>
__device__ __forceinline__ Common find_common(const Args& args, int low, int high, int start, bool in_tree, int behind) {
  const Span first = find_span(low, args.length, behind), last = find_span(high, args.length, behind);
  return {first.from, in_tree && last.to > start ? high + 1 : last.to, last.from, first.to};
}

// The head of a row, of the queries for keys so many chunks behind.
template <int D, class Args>
__device__ __forceinline__ auto row_query(const Args& args, const Sequence& seq, int kv_head, int row, int behind) {
  const long long token = seq.first_token + row / args.group;
  const auto* head = args.q + token * args.q_stride + (kv_head * args.group + row % args.group) * D;
  if constexpr (DUAL<Args>) head += behind * args.behind * D;
  return head;
}

// What its scores lack.
template <class Args>
__device__ __forceinline__ float row_shift(const Args& args, const Sequence& seq, int kv_head, int row, int behind) {
  const long long token = seq.first_token + min(row, seq.num_rows - 1) / args.group;
  const int num_heads = args.num_kv_heads * args.group;
  return args.shifts[behind * args.behind + token * num_heads + kv_head * args.group + row % args.group];
}

// Index of (token, head, chunk) among the partial results.
template <class Args>
__device__ __forceinline__ long long partial_row(const Args& args, int seq_index, int query, int head, int chunk) {
  const int start = args.partial_starts ? args.partial_starts[seq_index] : args.cu_seqlens[seq_index];
  const int num_heads = args.num_kv_heads * args.group;
  return (static_cast<long long>(start + query) * num_heads + head) * args.max_chunks + chunk;
}

// Weight of a part whose scores' maximum is 2^m and whose weights sum to l, beside parts of at most 2^top. A part that
// saw no key (l = 0) has none; NaN stays NaN.
__device__ __forceinline__ float part_weight(float m, float l, float top) { return l == 0.f ? 0.f : ptx::ex2(m - top); }

__device__ __forceinline__ float4 scaled(float4 x, float by) {
  return make_float4(x.x * by, x.y * by, x.z * by, x.w * by);
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 x, float by) {
  sum.x += x.x * by, sum.y += x.y * by, sum.z += x.z * by, sum.w += x.w * by;
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Write the mean that a sum of weights l makes of o.
template <class T>
__device__ __forceinline__ void put_mean(T* out, float4 o, float l) {
  const float4 mean = scaled(o, l == 0.f ? 0.f : 1.f / l);
  *reinterpret_cast<Four<T>*>(out) = {from_float<T>(mean.x), from_float<T>(mean.y), from_float<T>(mean.z),
                                      from_float<T>(mean.w)};
}

// Merge what PARTS warps found out about rows [first_row, first_row + count) of a sequence and write it: the result
// where the sequence has one chunk, else this chunk's share. Shared: o [PARTS][ROWS][D + 8], ml [PARTS][ROWS].
template <int D, int PARTS, int ROWS, class Args>
__device__ __forceinline__ void write_rows(const Args& args, int seq_index, const Sequence& seq, int kv_head, int chunk,
                                           int first_row, int count, const float* o, const float2* ml, int thread,
                                           int num_threads) {
  for (int e = thread; e < count * (D / 4); e += num_threads) {
    const int r = e / (D / 4), d = e % (D / 4) * 4, row = first_row + r;
    const int query = row / args.group, head = kv_head * args.group + row % args.group;
    float top = NEG_INF, l = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) top = fmaxf(top, ml[p * ROWS + r].x);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
      const float2 part = ml[p * ROWS + r];
      const float weight = part_weight(part.x, part.y, top);
      l += part.y * weight;
      add_scaled(sum, *reinterpret_cast<const float4*>(o + (p * ROWS + r) * (D + 8) + d), weight);
    }
    if (seq.num_chunks == 1) {
      const long long token = seq.first_token + query;
      put_mean(args.out + (token * args.num_kv_heads * args.group + head) * D + d, sum, l);
    } else {
      const long long at = partial_row(args, seq_index, query, head, chunk);
      *reinterpret_cast<float4*>(args.partial_out + at * D + d) = sum;
      if (d == 0) *reinterpret_cast<float2*>(args.partial_sum + at * 2) = make_float2(top, l);
    }
  }
}
