// How K and V lie in the paged cache: chunks of sixteen tokens of one KV head, K as [head_dim / P][16][P] and V as
// [16 / P][head_dim][P] with P elements to a word of 32 bits. Both are read as whole words by the same dot product, so
// neither QK^T nor PV needs a transpose.
//
// In int8 a token's key and its value are scale * q with |q| <= 127 and a scale each per KV head: a chunk ends with the
// float32 scales of its tokens. A word holds q + 128 in the order 0, 2, 1, 3, so that its even bytes and its odd ones,
// widened to int16, are two neighbours each.
//
// Keys are rounded after a Hadamard transform (hadamard.h) and relative to an origin: their sequence's first key, itself
// rounded, which lies with the sequence's first block. Softmax does not notice what all keys have in common, and in some
// models that is ten times as large as what tells them apart.
#pragma once
#include "api.h"
#include "vec.h"

struct Code {
    uint8_t byte;  // q + ZERO
    static constexpr int ZERO = 128, MOST = 127;
};

template <class E>
constexpr bool SCALED = false;
template <>
inline constexpr bool SCALED<Code> = true;

constexpr int CHUNK = 16;  // tokens
constexpr int MAX_HEAD_DIM = 256;

template <class E>
constexpr long chunk_bytes(long head_dim) {
    return CHUNK * (head_dim * long(sizeof(E)) + (SCALED<E> ? long(sizeof(float)) : 0));
}

// The chunk of the token at `offset` in a block.
template <class E>
INLINE char* chunk_at(const PagedKV& kv, char* cache, long block, long head, long offset) {
    return cache + ((block * kv.num_kv_heads + head) * kv.block_size + offset) / CHUNK * chunk_bytes<E>(kv.head_dim);
}

INLINE float* chunk_scales(const char* chunk, long head_dim) { return (float*)(chunk + CHUNK * head_dim); }

struct Origin {
    float scale;
    Code codes[1];  // head_dim of them
};
INLINE Origin* origin_of(const PagedKV& kv, long first_block, long head) {
    return (Origin*)(kv.origins + (first_block * kv.num_kv_heads + head) * (kv.head_dim + long(sizeof(float))));
}

// Where in its word of bytes the element i is.
INLINE long byte_in_word(long i) { return i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4; }
