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

// Constants of a 16-bit type for making it out of 8-bit numbers by moving bits.
template <class T>
struct Widening;
template <>
struct Widening<__half> {
  using Pair = __half2;
  static constexpr unsigned UPPER = 0x64646464;  // bytes of 2^10, whose mantissa counts ones
  static constexpr unsigned E4M3_SHIFT = 1, E4M3_FACTOR = 0x5c005c00;  // 2^8, twice: biased by 15, not 7
};
template <>
struct Widening<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr unsigned UPPER = 0x43434343;  // of 2^7
  static constexpr unsigned E4M3_SHIFT = 4, E4M3_FACTOR = 0x7b807b80;  // 2^120, twice
};

template <class T>
__device__ __forceinline__ typename Widening<T>::Pair as_pair(unsigned bits) {
  return *reinterpret_cast<const typename Widening<T>::Pair*>(&bits);
}

template <class T>
__device__ __forceinline__ unsigned minus(unsigned a, unsigned b) {
  const auto difference = __hsub2(as_pair<T>(a), as_pair<T>(b));
  return *reinterpret_cast<const unsigned*>(&difference);
}

// Four int8 as T: bytes 0 and 2 in `even`, 1 and 3 in `odd`. A number is its lower seven bits less 128 times the
// eighth: both parts get an upper byte under which they count ones, and the difference is exact. (In bfloat16 the
// eighth bit is the exponent's: 2^7 or 2^8.)
template <class T>
__device__ __forceinline__ void widen_int8(unsigned bytes, unsigned& even, unsigned& odd) {
  constexpr unsigned UPPER = Widening<T>::UPPER;
  const unsigned positive = bytes & 0x7f7f7f7fu, negative = bytes & 0x80808080u;
  even = minus<T>(__byte_perm(positive, UPPER, 0x4240), __byte_perm(negative, UPPER, 0x4240));
  odd = minus<T>(__byte_perm(positive, UPPER, 0x4341), __byte_perm(negative, UPPER, 0x4341));
}

// The upper bytes of both halves, e4m3, as T: bits moved into place and the exponent's bias multiplied away, which is
// exact, subnormal numbers included, and the same on every device. (NaN, the largest code, becomes 480.)
template <class T>
__device__ __forceinline__ unsigned widen_e4m3(unsigned bytes) {
  const unsigned bits = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> Widening<T>::E4M3_SHIFT;
  const auto product = __hmul2(as_pair<T>(bits), as_pair<T>(Widening<T>::E4M3_FACTOR));
  return *reinterpret_cast<const unsigned*>(&product);
}

// Four 8-bit numbers of either storage.
template <class T, class S>
__device__ __forceinline__ void widen(unsigned bytes, unsigned& even, unsigned& odd) {
  if constexpr (SCALED<S>) {
    widen_int8<T>(bytes, even, odd);
  } else {
    even = widen_e4m3<T>(bytes << 8);
    odd = widen_e4m3<T>(bytes);
  }
}
