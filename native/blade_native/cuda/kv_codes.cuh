// How keys and values are kept, and how codes become what tensor cores take. The modes and their rounding are those of
// kv_codes.py.
#pragma once
#include "portable.cuh"

// As numbers of E, without scales.
template <class E_>
struct Plain {
  using E = E_;
  using Number = float;
  static constexpr int BITS = 8 * sizeof(E), TOP = 0;
  static constexpr bool AFFINE = false;
  static constexpr int numbers(int) { return 0; }
};

// As codes: kv_codes.py's Kept. E is signed char for integers; Number is the type of scales and middles.
template <class E_, class Number_, int BITS_ = 8, int GROUP = 0, bool AFFINE_ = false, int TOP_ = 0>
struct Code {
  using E = E_;
  using Number = Number_;
  static constexpr int BITS = BITS_, TOP = TOP_;
  static constexpr bool AFFINE = AFFINE_;
  static constexpr int group(int head_dim) { return GROUP && head_dim % GROUP == 0 ? GROUP : head_dim; }
  static constexpr int groups(int head_dim) { return head_dim / group(head_dim); }
  static constexpr int numbers(int head_dim) { return groups(head_dim) * (AFFINE ? 2 : 1); }  // of one head
};
using Int8 = Code<signed char, float>;
using Int8Affine = Code<signed char, float, 8, 0, true>;
using Int4 = Code<signed char, __nv_bfloat16, 4, 64>;
using Int4Affine = Code<signed char, __nv_bfloat16, 4, 32, true>;
using E4m3 = Code<__nv_fp8_e4m3, __nv_bfloat16, 8, 0, false, 7>;
using E5m2 = Code<__nv_fp8_e5m2, __nv_bfloat16, 8, 0, false, 14>;

// Keys and values of a cache in pages (see kv_storage.cuh), by the names of KVSpec.storage behind kv_. Of one byte, as
// the types of all rounded caches are: sizeof tells them from the others.
template <class Keys, class Values>
struct Mode {};
using kv_int8_affine = Mode<Int8Affine, Int8Affine>;
using kv_fp8_e5m2 = Mode<E5m2, E5m2>;
using kv_mix_i8i4 = Mode<Int8, Int4>;
using kv_mix_f843i4 = Mode<E4m3, Int4>;
using kv_mix_f852i4 = Mode<E5m2, Int4>;
using kv_int4_affine = Mode<Int4Affine, Int4Affine>;
using kv_int4 = Mode<Int4, Int4>;

// How S, the type that names a cache's storage, keeps keys and values.
template <class S>
struct Storage {
  using Keys = Plain<S>;
  using Values = Plain<S>;
};
template <>
struct Storage<signed char> {
  using Keys = Int8;
  using Values = Int8;
};
template <class K, class V>
struct Storage<Mode<K, V>> {
  using Keys = K;
  using Values = V;
};
template <class S>
constexpr bool IN_PAGES = false;
template <class K, class V>
constexpr bool IN_PAGES<Mode<K, V>> = true;

// Whether scales of 8-bit codes are left to scores and weights; those of 4 bits, which a head has several of, are
// applied in registers.
template <class C>
constexpr bool FACTORED = C::BITS == 8 && C::numbers(64) > 0;

template <class E>
constexpr int EXPONENT_BITS = 0;  // 0: integers
template <>
constexpr int EXPONENT_BITS<__nv_fp8_e4m3> = 4;
template <>
constexpr int EXPONENT_BITS<__nv_fp8_e5m2> = 5;

// Constants of a 16-bit type for making it out of numbers of fewer bits by moving bits.
template <class T>
struct Widening;
template <>
struct Widening<__half> {
  using Pair = __half2;
  static constexpr unsigned UPPER = 0x64646464;   // bytes of 2^10, whose mantissa counts ones
  static constexpr unsigned NIBBLE = 0x64086408;  // 2^10 + 8, twice
  static constexpr int EXPONENT = 5, MANTISSA = 10;
  static __device__ __forceinline__ unsigned pair_of(unsigned bf16) {
    return pack2<__half>(__int_as_float(bf16 << 16), __int_as_float(bf16 & 0xffff0000u));
  }
};
template <>
struct Widening<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr unsigned UPPER = 0x43434343;   // of 2^7
  static constexpr unsigned NIBBLE = 0x43084308;  // 2^7 + 8, twice
  static constexpr int EXPONENT = 8, MANTISSA = 7;
  static __device__ __forceinline__ unsigned pair_of(unsigned bf16) { return bf16; }
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

template <class T>
__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
  const auto product = __hmul2(as_pair<T>(a), as_pair<T>(b));
  return *reinterpret_cast<const unsigned*>(&product);
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

// The upper bytes of both halves, floats of 8 bits, as T times 2^-TOP: bits moved into place and the exponent's bias
// multiplied away. That is exact but for what is 2^-24 of the largest number, subnormal numbers included, and the same
// on every device. (NaN, e4m3's largest code, becomes 480; codes with scales have none.)
template <class T, class C>
__device__ __forceinline__ unsigned widen_float8(unsigned bytes) {
  constexpr int BITS = EXPONENT_BITS<typename C::E>, SHIFT = Widening<T>::EXPONENT - BITS;
  constexpr int BIAS = (1 << (BITS - 1)) - 1, OWN_BIAS = (1 << (Widening<T>::EXPONENT - 1)) - 1;
  constexpr unsigned FACTOR = (2 * OWN_BIAS - BIAS - C::TOP) << Widening<T>::MANTISSA;
  const unsigned bits = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> SHIFT;
  return times<T>(bits, FACTOR | FACTOR << 16);
}

// A word of codes as pairs of T. Of 8 bits: 0 and 2, 1 and 3. Of 4: 0 and 4, 1 and 5, 2 and 6, 3 and 7; the nibble of a
// number is its lowest bits, the sign flipped under 2^7, or 2^10, counts from -8.
template <class T, class C>
__device__ __forceinline__ void widen(unsigned word, unsigned (&pairs)[16 / C::BITS]) {
  if constexpr (C::BITS == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = minus<T>((word >> 4 * i & 0x000f000fu) ^ Widening<T>::NIBBLE, Widening<T>::NIBBLE);
  } else if constexpr (EXPONENT_BITS<typename C::E> == 0) {
    widen_int8<T>(word, pairs[0], pairs[1]);
  } else {
    pairs[0] = widen_float8<T, C>(word << 8);
    pairs[1] = widen_float8<T, C>(word);
  }
}

// Scale and middle of two codes of 4 bits, in T as the torch twin has their numbers.
template <class T, class C>
struct Factor {
  unsigned scale, middle;

  // Of the numbers of two tokens side by side, or of one; a group's middle lies `to_middle` numbers behind its scale.
  __device__ __forceinline__ void load_two(const typename C::Number* numbers, int to_middle) {
    scale = Widening<T>::pair_of(*reinterpret_cast<const unsigned*>(numbers));
    if constexpr (C::AFFINE) middle = Widening<T>::pair_of(*reinterpret_cast<const unsigned*>(numbers + to_middle));
  }
  __device__ __forceinline__ void load_one(const typename C::Number* numbers, int to_middle) {
    scale = Widening<T>::pair_of(*reinterpret_cast<const unsigned short*>(numbers) * 0x10001u);
    if constexpr (C::AFFINE)
      middle = Widening<T>::pair_of(*reinterpret_cast<const unsigned short*>(numbers + to_middle) * 0x10001u);
  }
  __device__ __forceinline__ unsigned apply(unsigned codes) const {
    if constexpr (C::AFFINE) return fma2<T>(codes, scale, middle);
    return times<T>(codes, scale);
  }
};
