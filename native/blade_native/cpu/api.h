// The C ABI that the Python side calls through ctypes. Every function trusts its arguments: ops.py has checked them.
// Functions return 0, or OUT_OF_MEMORY when scratch could not be had, and work on `threads` threads (parallel.h).
#pragma once
#include <cstdint>
#include <cstdlib>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Status { OK = 0, OUT_OF_MEMORY = 1 };
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };

// How a group's scale or offset is kept. CODES count multiples of a block's float16; ZEROS are integer zero points.
enum Numbers { NONE = 0, HALF = 1, UNSIGNED_CODES = 2, SIGNED_CODES = 3, ZEROS = 4 };

// What a weight is: 32 (float) or 16 (bf16) bits, or 8, 6, 5 or 4 of an unsigned integer q in groups of a row, which
// share a scale and an offset: w = scale * q + offset. Without offsets q is centred: w = scale * (q - 2^(bits - 1)).
struct Format {
    int32_t bits;
    int32_t group;    // 16, 32, 64 or 128; a multiple of 32 for 4 and 5 bits
    int32_t scales;   // HALF, UNSIGNED_CODES or SIGNED_CODES
    int32_t offsets;  // NONE, HALF, UNSIGNED_CODES or SIGNED_CODES (minima), or ZEROS: offset = -scale * zero
    int64_t block;    // weights of a row that share what the codes count; 0 without codes
};

// Weights [n, k] in panels of 32 output channels, the last one padded with zeros; linear_format.h has the layouts.
struct Linear {
    Format format;
    int64_t n, k;  // k is even for bf16, a multiple of group and block for grouped weights
    const char* weights;
    const float* bias;  // padded to whole panels, or null
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

// Grouped weights as checkpoints have them: q [n, k] bytes; scales and offsets [n, k / group], halves or bytes as the
// format says; block_scales and block_offsets [n, k / block] halves. What the format lacks is null.
struct Grouped {
    const uint8_t* q;
    const void *scales, *offsets;
    const uint16_t *block_scales, *block_offsets;
};

// One layer's paged cache. K is [block][kv head][block_size / 16][head_dim / P][16][P] and V is
// [block][kv head][block_size / P][head_dim][P] with P = 4 / itemsize elements per word: both are read as whole words
// by the same dot product that linears use, so neither QK^T nor PV needs a transpose.
struct PagedKV {
    int32_t dtype, num_heads, num_kv_heads, head_dim, block_size;  // block_size and head_dim: multiples of 16
    char *k, *v;
};

// Memory for one call, freed when it ends.
struct Scratch {
    void* data;
    explicit Scratch(size_t bytes) : data(bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};
