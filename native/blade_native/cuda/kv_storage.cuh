// How keys and values lie in the paged cache and in shared memory, and how 8-bit ones become what tensor cores take.
//
// Cache: [num_blocks, 2, KV, block_size, D], keys at 0 and values at 1. All tokens of one head in one block lie side by
// side, so 16 tokens are one run of memory (4 KB for D = 128 in 16 bits) behind one entry of the block table.
// int8 has a float scale per token and head, [num_blocks, 2, KV, block_size]; fp8 (e4m3) has none.
#pragma once
#include "portable.cuh"

template <class S>
constexpr bool SCALED = false;
template <>
constexpr bool SCALED<signed char> = true;

// Row of a block's first key of kv_head, among the cache's rows of D elements; its values start
// num_kv_heads * block_size rows later.
__device__ __forceinline__ long long cache_row(long long block, int kv_head, int num_kv_heads, int block_size) {
  return (block * 2 * num_kv_heads + kv_head) * block_size;
}

// KEYS tokens in shared memory: keys, values, then the scales of both. A row is padded to an odd number of 16-byte
// chunks, so that the eight rows of an ldmatrix tile lie in different banks.
template <class S, int D, int KEYS>
struct KeyStage {
  static constexpr int CHUNKS = D * sizeof(S) / 16;
  static constexpr int ROW = (CHUNKS | 1) * 16;  // bytes
  static constexpr int VALUES = KEYS * ROW;
  static constexpr int SCALES = 2 * VALUES;
  static constexpr int BYTES = SCALES + (SCALED<S> ? 2 * KEYS * 4 : 0);
  static_assert(D * sizeof(S) % 16 == 0 && KEYS % 16 == 0, "whole chunks, whole mma steps");
};

// Two 16-bit numbers times one, in a register.
template <class T>
struct Packed;
template <>
struct Packed<__half> {
  using Pair = __half2;
  static constexpr unsigned E4M3_SHIFT = 1, E4M3_FACTOR = 0x5c005c00;  // 2^8, twice: exponents are biased by 15, not 7
};
template <>
struct Packed<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr unsigned E4M3_SHIFT = 4, E4M3_FACTOR = 0x7b807b80;  // 2^120, twice
};

// The upper bytes of both halves of `bytes`, e4m3, as T: bits moved into place and the exponent's bias multiplied away,
// which is exact, subnormal numbers included, and the same on every device. (NaN, the largest code, becomes 480.)
template <class T>
__device__ __forceinline__ unsigned widen_e4m3(unsigned bytes) {
  using Pair = typename Packed<T>::Pair;
  const unsigned bits = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> Packed<T>::E4M3_SHIFT;
  const unsigned factor = Packed<T>::E4M3_FACTOR;
  const Pair product = __hmul2(*reinterpret_cast<const Pair*>(&bits), *reinterpret_cast<const Pair*>(&factor));
  return *reinterpret_cast<const unsigned*>(&product);
}

__device__ __forceinline__ float byte_to_float(unsigned bytes, int index) {
  return static_cast<float>(static_cast<signed char>(bytes >> 8 * index));
}

// Four 8-bit numbers as T: bytes 0 and 2 in `even`, 1 and 3 in `odd`.
template <class T, class S>
__device__ __forceinline__ void widen(unsigned bytes, unsigned& even, unsigned& odd) {
  if constexpr (SCALED<S>) {
    even = pack2<T>(byte_to_float(bytes, 0), byte_to_float(bytes, 2));
    odd = pack2<T>(byte_to_float(bytes, 1), byte_to_float(bytes, 3));
  } else {
    even = widen_e4m3<T>(bytes << 8);
    odd = widen_e4m3<T>(bytes);
  }
}
