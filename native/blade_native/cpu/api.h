// The C ABI that the Python side calls through ctypes. Every function trusts its arguments: ops.py has checked them.
// Functions return 0, or OUT_OF_MEMORY when scratch could not be had, and work on `threads` threads (parallel.h).
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

// Memory for one call, freed when it ends.
struct Scratch {
    void* data;
    explicit Scratch(size_t bytes) : data(bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};
