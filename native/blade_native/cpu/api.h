// The C ABI that the Python side calls through ctypes. Every function trusts its arguments: ops.py has checked them.
// Kernels take one pointer, to their *Call struct, so that a step's calls can be recorded and replayed (replay.cpp).
// They return 0, or what went wrong (Status), and work on `threads` threads (parallel.h).
#pragma once
#include <cstdint>
#include <cstdlib>

#include "vec.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Status {
    OK = 0,
    OUT_OF_MEMORY = 1,  // for scratch
    OUT_OF_RANGE = 2,   // an expert's id
};
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, FLOAT16 = 3, INT4 = 4, E4M3 = 5, E5M2 = 6 };

// Calls body with an instance of the dtype's type, FLOAT32 or BFLOAT16.
template <class Body>
INLINE void with_dtype(int dtype, Body body) {
    if (dtype == FLOAT32)
        body(float{});
    else
        body(bf16{});
}

// How a group's scale or offset is kept: as float16 (HALF), bfloat16 (BRAIN) or float32 (SINGLE). CODES count multiples of
// a block's float16; ZEROS are integer zero points.
enum Numbers { NONE = 0, HALF = 1, UNSIGNED_CODES = 2, SIGNED_CODES = 3, ZEROS = 4, BRAIN = 5, SINGLE = 6 };

// What the bits of a grouped weight are.
enum Coding { INTEGERS = 0, VALUES = 1, FLOATS = 2, NESTED = 3 };

// What a weight is: 32 (float) or 16 (bf16) bits, or 8, 6, 5 or 4 of an unsigned integer q in groups of a row, which
// share a scale and an offset: w = scale * q + offset. Without offsets q is centred: w = scale * (q - 2^(bits - 1)). With
// VALUES, of 4 bits, w = scale * (values[q] - zero) + offset. FLOATS are of 8 bits (e4m3, without infinities),
// w = scale * q, with SINGLE scales. NESTED are of 4 bits with UNSIGNED_CODES of both kinds that count the same unit, a minimum
// being -unit * code: w = unit * (scale code * q - minimum code), where the integer fits a signed byte for every q, and
// scale codes are 1 to 16.
struct Format {
    int32_t bits;
    int32_t group;    // 16, 32, 64 or 128; a multiple of 32 for integers of 4 and 5 bits; any even one for floats
    int32_t scales;   // HALF, BRAIN, SINGLE, UNSIGNED_CODES or SIGNED_CODES
    int32_t offsets;  // NONE, HALF, UNSIGNED_CODES or SIGNED_CODES (minima), or ZEROS: offset = -scale * zero
    int64_t block;    // weights of a row that share what the codes count; 0 without codes
    int32_t coding;
    int32_t zero;         // of the values
    uint8_t values[16];  // all below 32, or any
};

// Weights [n, k] in panels of 32 output channels, the last one padded with zeros; linear_format.h has the layouts.
struct Linear {
    Format format;
    int64_t n, k;  // k is even for bf16, a multiple of group and block for integers and values
    const char* weights;
    const float* bias;     // padded to whole panels, or null
    const int32_t* order;  // [k]: column i multiplies feature order[i] of x, of grouped weights. Null: feature i
};

// y [m, n] = x [m, k] W^T + b. x is contiguous, of the weights' dtype, or of either for grouped weights.
struct LinearCall {
    const Linear* linear;
    const void* x;
    int32_t x_dtype;
    int64_t m;
    void* y;
    int32_t y_dtype;
    int64_t y_stride;  // elements from row to row of y, at least n
    int32_t threads;
};

// Grouped weights as checkpoints have them: q [n, k] bytes; scales and offsets [n, k / group], floats or bytes as the
// format says; block_scales and block_offsets [n, k / block] halves. What the format lacks is null.
struct Grouped {
    const uint8_t* q;
    const void *scales, *offsets;
    const uint16_t *block_scales, *block_offsets;
};

// Weights of 8-bit floats: q [n, k], and a scale for each block of block_n rows and block_k columns, the last ones short.
struct Float8 {
    const uint8_t* q;
    const float* scales;
    int64_t block_n, block_k;
};

// Plain weights [n, k], of FLOAT32, BFLOAT16 or FLOAT16, and the grouped ones they are rounded to: of 8 bits with halves as
// scales [n, k / group], or of 4 bits with codes of scales and minima. These are NESTED, and count units [n, k / block],
// where this level multiplies bytes and the error is not much larger so; else they count block_scales and block_minima [n].
struct Rounding {
    const void* weight;
    int32_t dtype, bits, group;  // group: a multiple of 16, at most 128
    int64_t n, k;
    uint8_t* q;
    void* scales;
    uint8_t* minima;
    uint16_t *block_scales, *block_minima;
    uint16_t* units;
    int32_t block;   // of the units: whole groups
    int32_t nested;  // whether they are, as it turned out
};

// How keys, or values, are kept: as they are, or rounded (kv_chunk.h).
struct Kept {
    int32_t storage;  // the cache's dtype, or INT8, INT4, E4M3, E5M2
    int32_t group;    // channels that share a scale: the head, or with integers a part of it that is a multiple of 32
    int32_t affine;   // integers have a middle beside their scale
};

// One layer's paged cache, [block][kv head][block_size / 16] chunks of sixteen tokens; kv_chunk.h has their layout.
// `dtype` is that of q, k, v and the output.
struct PagedKV {
    int32_t dtype, num_heads, num_kv_heads, head_dim, block_size;  // block_size and head_dim: multiples of 16
    Kept keys, values;
    char *k, *v;
    char* origins;  // [block][kv head], where keys are rounded
};

// One ragged step (blade.types.Batch): B sequences, T tokens laid end to end.
struct Step {
    const int64_t *positions, *slots;                          // [T]
    const int32_t *cu_seqlens, *context_lens, *block_tables;  // [B + 1], [B], [B, max_blocks]
    const int64_t* ancestors;                                  // [T], or null where no draft of the step is a tree
    int64_t num_tokens, num_seqs, max_blocks;
};

// Which states a step's sequences read and write; below 0: none (blade.types.Batch).
struct Slots {
    const int32_t *cu_seqlens, *in, *out;  // [B + 1], [B], [B]
    int64_t num_seqs;
};

// out [num_rows, k] = rows of a packed matrix, dequantised into `dtype`; dense ones come in their own.
struct UnpackRowsCall {
    const Linear* linear;
    const int64_t* rows;
    int64_t num_rows;
    void* out;
    int32_t dtype;
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

// y [.., d], at rows [num_rows] of it (null: the first num_rows), += x [num_rows, d]. No row comes twice.
struct AddRowsCall {
    int32_t dtype;
    const void* x;
    const int64_t* rows;
    int64_t num_rows, d;
    void* y;
    int32_t threads;
};

// out [num_rows, row_bytes] = x alike; rows begin `x_stride` and `out_stride` bytes after each other.
struct CopyRowsCall {
    const char* x;
    int64_t num_rows, row_bytes, x_stride;
    char* out;
    int64_t out_stride;
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

// y [rows, d] = x * factors[at[row]], x with x_stride elements from row to row.
struct ScaleRowsCall {
    int32_t dtype;
    const void* x;
    int64_t rows, d, x_stride;
    const float* factors;
    const int64_t* at;
    void* y;
    int32_t threads;
};

// x [rows, d] *= sigmoid(gate), in place; gate [rows, d] or [rows, 1] with gate_stride elements from row to row.
struct SigmoidMulCall {
    int32_t dtype;
    void* x;
    const void* gate;
    int64_t rows, d, gate_width, gate_stride;
    int32_t threads;
};

// q [T, H, D], k and v [T, KV, D] with strides between tokens in elements; cos_sin [max_context, rotary_dim], cosines in
// the first half of a row and sines in the second; q_out and k_out are contiguous.
//
// With `chunk`, for dual chunk attention, a key at position p turns by row p % chunk of cos_sin, and q_out is [3, T, H, D]:
// d chunks before its own a query meets keys turned by row min(p % chunk + d * chunk, farthest), for d = 0, 1, 2 (and more,
// where `farthest` is below 2 * chunk). What a sequence has no keys for is left as it is.
struct RopeAndStoreCall {
    const PagedKV* kv;
    const Step* step;
    const void *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    const float* cos_sin;
    int64_t rotary_dim;
    void *q_out, *k_out;
    int64_t chunk, farthest;
    int32_t threads;
};

// q [T, H, D] with q_stride elements between tokens -> out [T, H, D] contiguous, in q's dtype. Sequence b has
// tokens [cu_seqlens[b], cu_seqlens[b + 1]), the last of context_lens[b] whose KV is stored. head_dim <= 256.
struct AttendCall {
    const PagedKV* kv;
    const Step* step;
    const void* q;
    int64_t q_stride;
    float scale;
    int64_t window;  // last tokens that are seen; below 0 only those of one chunk of -window positions; 0: all
    void* out;
    int64_t q_behind;  // not 0: all tokens are seen, and q is RopeAndStoreCall's q_out, so many elements from d to d + 1
    int32_t threads;
};

// logits [rows, n] -> values and ids [rows], the first of the largest; the value is NaN where there is NaN or +infinity.
struct ArgmaxCall {
    const float* logits;
    int64_t rows, n;
    float* values;
    int64_t* ids;
    int32_t threads;
};

// A token of each row of logits [rows, n], which become anything. Of the tokens, after division by temperatures [rows]: the
// top_k [rows] most likely (n and more: all), of those the most likely that together have a share of top_p [rows] (1 and
// more: all), of those the ones at least min_p [rows] times as likely as the most likely one; those as likely as the last
// of them too. u [rows], in [0, 1), says which, in the order of ids. peaks and ids [rows]: the largest logit, as ArgmaxCall
// has it, and the token; the first of the most likely ones where a temperature is 0 or the peak is not finite.
struct DrawCall {
    float* logits;
    int64_t rows, n;
    const float* temperatures;
    const int64_t* top_k;  // at least 1
    const double* top_p;
    const float* min_p;
    const double* u;
    float* peaks;
    int64_t* ids;
    int32_t threads;
};

// logits [rows, n] -> the logarithm of the sum of each row's exponentials [rows]; the k largest less that, and their ids,
// [rows, k] each, largest first, equal ones by id. 0 <= k <= n. Of a row with NaN or +infinity the sum is NaN, and the ids
// are any in range.
struct LogprobsCall {
    const float* logits;
    int64_t rows, n, k;
    float *log_sums, *logprobs;
    int64_t* ids;
    int32_t threads;
};

// logits [rows, n] -> ids [rows, k] of the largest, equal ones by id, and their shares of the softmax, or with `sigmoid`
// their own; with `normalize` divided by the sum of these k. Of a row with NaN or +infinity the weights are NaN and the ids any in range. 1 <= k <= n.
struct RouteCall {
    int32_t dtype;
    const void* logits;
    int64_t rows, n, k;
    int32_t normalize, sigmoid;
    int64_t* ids;
    float* weights;
    int32_t threads;
};

// A mixture of gated MLPs: y [m, d] = for each row of x the sum over its k experts, weighted, of
// down(silu(first half of gate_up(x)) * second half). ids and weights [m, k]; gate_up and down [num_experts] matrices
// [2 inner, d] and [d, inner], each in its own format; dense ones of gate_up are of x's dtype.
struct ExpertsCall {
    const Linear *const *gate_up, *const *down;
    int64_t num_experts, d, inner;
    int32_t dtype;  // of x and y
    const void* x;
    int64_t m, k;
    const int64_t* ids;
    const float* weights;
    void* y;
    int32_t weigh_input;  // the weights are x's, rounded to dtype as their products are, and not the outputs'
    int32_t threads;
};

// y [T, channels] = silu of a causal convolution of x along each sequence; weight [channels, window], state
// [num_slots, channels, window - 1]. x has x_stride elements between tokens; window is 2, 3 or 4.
struct ShortConvCall {
    int32_t dtype;
    const Slots* slots;
    const void* x;
    int64_t x_stride, channels, window;
    const void* weight;
    void* state;
    void* y;
    int32_t threads;
};

// The gated delta rule along each sequence (contracts.Ops.gated_delta). q, k [T, hk, dk], v [T, hv, dv] and a, b [T, hv]
// with strides between tokens in elements; decay and dt_bias [hv]; state [num_slots, hv, dk, dv]; out [T, hv, dv]
// contiguous. dv is a multiple of 16.
struct GatedDeltaCall {
    int32_t dtype;
    const Slots* slots;
    const void *q, *k, *v, *a, *b;
    int64_t q_stride, k_stride, v_stride, a_stride, b_stride;
    int64_t hk, hv, dk, dv;
    const float *decay, *dt_bias;
    float* state;
    void* out;
    int32_t threads;
};

// y = rms_norm(x) * silu(gate): x and y [T, heads, d] contiguous, gate with gate_stride elements between tokens.
struct GatedRmsNormCall {
    int32_t dtype;
    const void *x, *gate;
    int64_t tokens, heads, d, gate_stride;
    const void* weight;
    float eps;
    void* y;
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

// Keys to choose by, kept beside the cache: kept [num_blocks * block_size, d] at the step's slots. A token keeps k [T, d]
// (k_stride elements between tokens) until the last of its `group` consecutive tokens comes, which keeps what stands for
// them all: their mean, normalised with weight [d], turned by the row of cos_sin [.., rotary_dim] of the group's first
// position. All of `dtype`; d is a multiple of 16. No draft of the step is a tree.
struct KeepIndexKeysCall {
    int32_t dtype;
    const Step* step;
    const void* k;
    int64_t k_stride, d;
    const void* weight;
    float eps;
    const float* cos_sin;
    int64_t rotary_dim, group, block_size;
    void* kept;
    int32_t threads;
};

// slots [T, budget + group - 1] of the keys that each of the step's queries is to see, in the order of their tokens, and -1
// behind them: of the whole groups that it could see those budget / group whose kept key makes the largest sum over heads of
// max(0, q . key), the earlier of equal ones, and the tokens after the last whole group. q [T, num_heads, d], q_stride
// elements between tokens, is yet to be turned.
struct SelectKeysCall {
    int32_t dtype;
    const Step* step;
    const void* q;
    int64_t q_stride, num_heads, d;
    const float* cos_sin;
    int64_t rotary_dim;
    const void* kept;
    int64_t group, budget, block_size;
    int32_t* slots;
    int32_t threads;
};

// AttendCall of queries that see the keys at slots [num_tokens, width] alone, one at least; -1 behind the last of them.
struct AttendSlotsCall {
    const PagedKV* kv;
    const void* q;
    int64_t q_stride;
    float scale;
    const int32_t* slots;
    int64_t num_tokens, width;
    void* out;
    int32_t threads;
};
