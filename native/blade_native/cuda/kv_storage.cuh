// How keys and values lie in the paged cache and in shared memory.
//
// Cache: [num_blocks, 2, KV, block_size, D], keys at 0 and values at 1. All tokens of one head in one block lie side by
// side, so 16 tokens are one run of memory (4 KB for D = 128 in 16 bits) behind one entry of the block table.
// int8 has a float scale per token and head, [num_blocks, 2, KV, block_size]; fp8 (e4m3) has none.
// The other modes lie in pages, [num_blocks, KV] of them: keys [block_size, bytes], values likewise, then the numbers of
// keys and of values, [scales of all groups and their middles, block_size] each. Of 4 bits the even channels are low.
#pragma once
#include "kv_codes.cuh"

template <class S>
constexpr bool SCALED = false;
template <>
constexpr bool SCALED<signed char> = true;

// Whether keys are rounded, and kept relative to an origin: see kv_store.cu.
template <class S>
constexpr bool RELATED = sizeof(S) == 1;

// Row of a block's first key of kv_head, among the cache's rows of D elements; its values start
// num_kv_heads * block_size rows later.
__device__ __forceinline__ long long cache_row(long long block, int kv_head, int num_kv_heads, int block_size) {
  return (block * 2 * num_kv_heads + kv_head) * block_size;
}

// Where the parts of a page are, in bytes from its start.
template <class S, int D>
struct Page {
  using Keys = typename Storage<S>::Keys;
  using Values = typename Storage<S>::Values;
  static constexpr int KEY_BYTES = D * Keys::BITS / 8, VALUE_BYTES = D * Values::BITS / 8;  // of a token
  static constexpr int KEY_NUMBER = sizeof(typename Keys::Number), VALUE_NUMBER = sizeof(typename Values::Number);
  int block_size;

  __device__ __forceinline__ int values() const { return block_size * KEY_BYTES; }
  __device__ __forceinline__ int key_numbers() const { return block_size * (KEY_BYTES + VALUE_BYTES); }
  __device__ __forceinline__ int value_numbers() const {
    return key_numbers() + block_size * Keys::numbers(D) * KEY_NUMBER;
  }
  __device__ __forceinline__ int bytes() const {
    return value_numbers() + block_size * Values::numbers(D) * VALUE_NUMBER;
  }
  __device__ __forceinline__ long long start(long long block, int kv_head, int num_kv_heads) const {
    return (block * num_kv_heads + kv_head) * bytes();
  }
};

// KEYS tokens in shared memory: keys, values, then the numbers of both. A row is padded to an odd number of 16-byte
// chunks, so that the eight rows of an ldmatrix tile lie in different banks.
template <class S, int D, int KEYS>
struct KeyStage {
  using Keys = typename Storage<S>::Keys;
  using Values = typename Storage<S>::Values;
  static constexpr int chunks(int bits) { return (D * bits / 8 + 15) / 16; }
  static constexpr int KEY_CHUNKS = chunks(Keys::BITS), VALUE_CHUNKS = chunks(Values::BITS);
  static constexpr int KEY_ROW = (KEY_CHUNKS | 1) * 16, VALUE_ROW = (VALUE_CHUNKS | 1) * 16;  // bytes
  static constexpr int VALUES = KEYS * KEY_ROW;
  static constexpr int KEY_NUMBERS = VALUES + KEYS * VALUE_ROW;
  static constexpr int VALUE_NUMBERS = KEY_NUMBERS + Keys::numbers(D) * KEYS * sizeof(typename Keys::Number);
  static constexpr int BYTES = VALUE_NUMBERS + Values::numbers(D) * KEYS * sizeof(typename Values::Number);
  static_assert(D % 16 == 0 && KEYS % 16 == 0, "whole mma steps");
};
