// The C ABI that the Python side calls through ctypes. Every function trusts its arguments: ops.py has checked them.
// Kernels take one pointer, to their *Call struct, so that a step's calls can be recorded and replayed (replay.cpp).
// They return 0, or OUT_OF_MEMORY when scratch could not be had, and work on `threads` threads (parallel.h).
#pragma once
#include <cstdint>
#include <cstdlib>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Status { OK = 0, OUT_OF_MEMORY = 1 };
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };
enum Kind { DENSE_F32 = 0, DENSE_BF16 = 1, GROUPED_INT8 = 2, GROUPED_INT4 = 3 };

// Weights [n, k] in panels of 32 output channels, the last one padded with zeros; linear_kinds.h has the layouts.
struct Linear {
    int32_t kind;
    int64_t n, k;  // k is even for bf16, a multiple of the group for the grouped kinds
    const char* weights;
    const float* bias;  // padded to whole panels, or null
};

// One layer's paged cache. K is [block][kv head][block_size / 16][head_dim / P][16][P] and V is
// [block][kv head][block_size / P][head_dim][P] with P = 4 / itemsize elements per word: both are read as whole words
// by the same dot product that linears use, so neither QK^T nor PV needs a transpose.
struct PagedKV {
    int32_t dtype, num_heads, num_kv_heads, head_dim, block_size;  // block_size and head_dim: multiples of 16
    char *k, *v;
};

// One ragged step (blade.types.Batch): B sequences, T tokens laid end to end.
struct Step {
    const int64_t *positions, *slots;                          // [T]
    const int32_t *cu_seqlens, *context_lens, *block_tables;  // [B + 1], [B], [B, max_blocks]
    int64_t num_tokens, num_seqs, max_blocks;
};

// y[m, n] = x[m, k] W^T + b; x in the kind's dtype (the grouped kinds take both), y in either.
struct LinearCall {
    const Linear* linear;
    const void* x;
    int32_t x_dtype;
    int64_t m;
    void* y;
    int32_t y_dtype;
    int64_t y_stride;  // elements between rows of y
    int32_t threads;
};

// out [num_rows, k] = rows of a packed dense matrix.
struct UnpackRowsCall {
    const Linear* linear;
    const int64_t* rows;
    int64_t num_rows;
    void* out;
    int32_t threads;
};

// out [num_rows, row_bytes] = rows of a table.
struct TakeRowsCall {
    const char* table;
    const int64_t* rows;
    int64_t num_rows, row_bytes;
    char* out;
    int32_t threads;
};

// x [outer, inner, d] with `stride` elements between outers -> y [outer, inner, d] contiguous.
struct RmsNormCall {
    int32_t dtype;
    const void* x;
    int64_t outer, inner, stride, d;
    const void* weight;
    float eps;
    void* y;
    int32_t threads;
};

// residual += x, in place; y = rms_norm(residual). All [rows, d].
struct AddRmsNormCall {
    int32_t dtype;
    const void* x;
    void* residual;
    int64_t rows, d;
    const void* weight;
    float eps;
    void* y;
    int32_t threads;
};

// gate_up [rows, 2 d] -> y [rows, d].
struct SiluMulCall {
    int32_t dtype;
    const void* gate_up;
    int64_t rows, d;
    void* y;
    int32_t threads;
};

// q [T, H, D], k and v [T, KV, D] with strides between tokens in elements; cos_sin [max_context, rotary_dim], cosines in
// the first half of a row and sines in the second; q_out and k_out are contiguous.
struct RopeAndStoreCall {
    const PagedKV* kv;
    const Step* step;
    const void *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    const float* cos_sin;
    int64_t rotary_dim;
    void *q_out, *k_out;
    int32_t threads;
};

// q [T, H, D] with q_stride elements between tokens -> out [T, H, D] contiguous, in the cache's dtype. Sequence b has
// tokens [cu_seqlens[b], cu_seqlens[b + 1]), the last of context_lens[b] whose KV is stored. head_dim <= 256.
struct AttendCall {
    const PagedKV* kv;
    const Step* step;
    const void* q;
    int64_t q_stride;
    float scale;
    int64_t window;  // 0: none
    void* out;
    int32_t threads;
};

// logits [rows, n] -> values and ids [rows], the first of the largest; NaN counts as -inf.
struct ArgmaxCall {
    const float* logits;
    int64_t rows, n;
    float* values;
    int64_t* ids;
    int32_t threads;
};

// logits [rows, n] -> values and ids [rows, k], largest first, equal ones by id. k <= n.
struct TopKCall {
    const float* logits;
    int64_t rows, n, k;
    float* values;
    int64_t* ids;
    int32_t threads;
};

// Memory for one call, freed when it ends.
struct Scratch {
    void* data;
    explicit Scratch(size_t bytes) : data(bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};
