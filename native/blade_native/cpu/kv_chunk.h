// How K and V lie in the paged cache: chunks of sixteen tokens of one KV head, K as [head_dim / P][16][P] and V as
// [16 / P][head_dim][P] with P elements to a word of 32 bits. Both are read as whole words by the same dot product, so
// neither QK^T nor PV needs a transpose.
//
// Rounded ones are codes: integers c of 8 or 4 bits, kept as c + ZERO, or floats of 8 bits. A token's key, and its value,
// is scale * c in every group of channels, or with integers that are affine scale * c + middle. A chunk ends with the
// scales of its tokens, [groups][16], and their middles likewise. Elements lie in a word as widening them wants it.
//
// Keys are rounded after a Hadamard transform (hadamard.h) and relative to an origin: their sequence's first key, itself
// rounded to 8 bits, which lies with the sequence's first block. Softmax does not notice what all keys have in common,
// and in some models that is ten times as large as what tells them apart. Values of 4 bits are rounded after a Hadamard
// transform too, which is taken back once they have been summed.
#pragma once
#include "api.h"
#include "vec.h"

struct Code8 {
    static constexpr int STORAGE = INT8, BITS = 8, ZERO = 128;
    typedef float Number;  // a scale, or a middle
    static constexpr int place(long i) { return i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4; }  // of element i in its word
};
struct Code4 {
    static constexpr int STORAGE = INT4, BITS = 4, ZERO = 8;
    typedef bf16 Number;
    static constexpr int place(long i) { return i % 8 / 2 + i % 2 * 4; }
};
// Floats of 8 bits: EXPONENT of them the exponent. A head's largest magnitude is at least 2^TOP and below its double.
template <int STORAGE_, int EXPONENT_, int TOP_>
struct Code8Float {
    static constexpr int STORAGE = STORAGE_, BITS = 8, EXPONENT = EXPONENT_, TOP = TOP_;
    static constexpr float UNIT = EXPONENT == 4 ? 0x1p120f : 0x1p112f;  // by which float32's bias exceeds theirs
    typedef bf16 Number;
    static constexpr int place(long i) { return i % 4; }
};
typedef Code8Float<E4M3, 4, 7> CodeE4M3;
typedef Code8Float<E5M2, 5, 14> CodeE5M2;

template <class E>
constexpr bool INTEGER = false;
template <>
inline constexpr bool INTEGER<Code8> = true;
template <>
inline constexpr bool INTEGER<Code4> = true;
template <class E>
constexpr bool CODED = INTEGER<E>;
template <>
inline constexpr bool CODED<CodeE4M3> = true;
template <>
inline constexpr bool CODED<CodeE5M2> = true;

// Calls body with an instance of the type whose codes are kept; does nothing where numbers are.
template <class Body>
INLINE void with_codes(int storage, Body body) {
    if (storage == INT8) body(Code8{});
    if (storage == INT4) body(Code4{});
    if (storage == E4M3) body(CodeE4M3{});
    if (storage == E5M2) body(CodeE5M2{});
}

constexpr int CHUNK = 16;  // tokens
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_GROUPS = MAX_HEAD_DIM / 32;

INLINE bool coded(const Kept& kept) { return kept.storage != FLOAT32 && kept.storage != BFLOAT16; }

INLINE bool transformed_values(const PagedKV& kv) { return kv.values.storage == INT4; }

INLINE long chunk_bytes(const Kept& kept, long head_dim) {
    if (!coded(kept)) return CHUNK * head_dim * (kept.storage == FLOAT32 ? 4 : 2);
    long bits = kept.storage == INT4 ? 4 : 8, number = kept.storage == INT8 ? sizeof(float) : sizeof(bf16);
    return CHUNK * (head_dim * bits / 8 + head_dim / kept.group * (kept.affine ? 2 : 1) * number);
}

// The chunk of the token at `offset` in a block, of a cache with chunks of `bytes`.
INLINE char* chunk_at(const PagedKV& kv, char* cache, long bytes, long block, long head, long offset) {
    return cache + ((block * kv.num_kv_heads + head) * kv.block_size + offset) / CHUNK * bytes;
}

// The scales of a group, of the chunk's tokens; those of middles follow the last group's.
template <class E>
INLINE typename E::Number* numbers_of(const char* chunk, long head_dim, long group) {
    return (typename E::Number*)(chunk + CHUNK * head_dim * E::BITS / 8) + group * CHUNK;
}

struct Origin {
    float scale;
    uint8_t codes[1];  // head_dim of them, of Code8
};
INLINE Origin* origin_of(const PagedKV& kv, long first_block, long head) {
    return (Origin*)(kv.origins + (first_block * kv.num_kv_heads + head) * (kv.head_dim + long(sizeof(float))));
}
