// A head of keys or values in a warp: its Hadamard transform, and how it is rounded.
#pragma once
#include "kv_storage.cuh"

constexpr float SMALLEST_SCALE = 1.17549435e-38f, SMALLEST_FLOAT = 7.88860905e-31f;  // as in kv_codes.py

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};

// The scale that maps a warp's largest magnitude to 127; NaN where there is a number that is not finite.
__device__ __forceinline__ float int8_scale(float largest, bool finite) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, lane));
  return __all_sync(FULL_WARP, finite) ? largest / 127.f : __int_as_float(0x7fffffff);
}

// Of a group of channels; `nothing` is 0, or NaN where a number is not finite.
struct Range {
  float low, high, nothing;

  __device__ __forceinline__ void add(const Range& other) {
    low = fminf(low, other.low), high = fmaxf(high, other.high), nothing += other.nothing;
  }
  __device__ __forceinline__ void add_lane(int other) {
    add({__shfl_xor_sync(FULL_WARP, low, other), __shfl_xor_sync(FULL_WARP, high, other),
         __shfl_xor_sync(FULL_WARP, nothing, other)});
  }
};

// A group's scale and middle, as they are kept.
struct Numbers {
  float scale, middle;
};

// A float of the number's precision.
template <class Number>
__device__ __forceinline__ float as_number(float x) {
  return to_float(from_float<Number>(x));
}

// See kv_codes.py's round_heads, which gives the same to the last bit.
template <class C>
__device__ __forceinline__ Numbers numbers_of(const Range& range) {
  using Number = typename C::Number;
  constexpr float MOST = 1 << (C::BITS - 1);
  if constexpr (EXPONENT_BITS<typename C::E> > 0) {
    const float most = fmaxf(range.high, -range.low);
    const bool usable = most >= SMALLEST_FLOAT && range.nothing == 0.f;
    const int exponent = __float_as_int(most) & 0x7f800000;
    return {usable ? __int_as_float(exponent - (C::TOP << 23)) : range.nothing, 0.f};
  } else {
    const bool positive = range.high >= -range.low;
    float scale;
    if constexpr (C::AFFINE) scale = (range.high - range.low) / (2 * MOST - 1);
    else if constexpr (C::BITS < 8) scale = (positive ? range.high : range.low) / -MOST;
    else scale = (positive ? range.high : -range.low) / (MOST - 1);
    scale = as_number<Number>(scale + range.nothing);
    return {scale, C::AFFINE ? as_number<Number>(range.low + scale * MOST) : 0.f};
  }
}

// A code in its lowest bits.
template <class C>
__device__ __forceinline__ unsigned code_of(float x, const Numbers& numbers, float inverse) {
  if constexpr (EXPONENT_BITS<typename C::E> > 0) {
    const auto code = from_float<typename C::E>(inverse == 0.f ? 0.f : x * inverse);
    return *reinterpret_cast<const unsigned char*>(&code);
  } else {
    constexpr float MOST = 1 << (C::BITS - 1);
    const float code = inverse == 0.f ? 0.f : (x - numbers.middle) * inverse;
    return __float2int_rn(fminf(fmaxf(code, -MOST), MOST - 1)) & ((1 << C::BITS) - 1);
  }
}

// A head in a warp, two channels a lane, 64 in all at [i]. Channels beyond D are 0.
template <int D>
struct Head {
  static constexpr int PER = (D / 2 + 31) / 32;
  float2 x[PER];

  template <class T>
  __device__ __forceinline__ void load(const T* from, int lane) {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      x[i] = make_float2(0.f, 0.f);
      if (d >= D) continue;
      const Two<T> two = *reinterpret_cast<const Two<T>*>(from + d);
      x[i] = make_float2(to_float(two.x), to_float(two.y));
    }
  }

  template <class T>
  __device__ __forceinline__ void put(T* to, int lane) const {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d >= D) continue;
      const Two<T> rounded = {from_float<T>(x[i].x), from_float<T>(x[i].y)};
      *reinterpret_cast<Two<T>*>(to + d) = rounded;
    }
  }

  // Every block of D's largest power of two times an orthonormal Hadamard matrix: kv_codes.py's hadamard.
  __device__ __forceinline__ void transform(int lane) {
    constexpr int BLOCK = D & -D;
    constexpr float FACTOR = BLOCK == 256 ? 0.0625f : BLOCK == 128 ? 0.0883883476f : BLOCK == 64 ? 0.125f
                             : BLOCK == 32 ? 0.176776695f : 0.25f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      x[i] = make_float2((x[i].x + x[i].y) * FACTOR, (x[i].x - x[i].y) * FACTOR);
#pragma unroll
      for (int other = 1; other < BLOCK / 2 && other < 32; other *= 2) {
        const float sign = lane & other ? -1.f : 1.f;
        x[i].x = __shfl_xor_sync(FULL_WARP, x[i].x, other) + sign * x[i].x;
        x[i].y = __shfl_xor_sync(FULL_WARP, x[i].y, other) + sign * x[i].y;
      }
    }
#pragma unroll
    for (int other = 1; other < BLOCK / 64; other *= 2)
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        if (i & other) continue;
        const float2 a = x[i], b = x[i + other];
        x[i] = make_float2(a.x + b.x, a.y + b.y), x[i + other] = make_float2(a.x - b.x, a.y - b.y);
      }
  }

  // Rounds to S, `to` [D]; returns the scale, 1 where S has none.
  template <class S>
  __device__ __forceinline__ float store(S* to, int lane) const {
    float scale = 1.f;
    if constexpr (SCALED<S>) {
      float largest = 0.f;
      bool finite = true;
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        const float a = fabsf(x[i].x), b = fabsf(x[i].y);
        largest = fmaxf(largest, fmaxf(a, b));
        finite = finite && a < -NEG_INF && b < -NEG_INF;
      }
      scale = int8_scale(largest, finite);
    }
    const float inverse = scale > 0.f ? 1.f / scale : 0.f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d >= D) continue;
      const Two<S> stored = {from_float<S>(x[i].x * inverse), from_float<S>(x[i].y * inverse)};
      *reinterpret_cast<Two<S>*>(to + d) = stored;
    }
    return scale;
  }

  // Of the group of x[i]: 32 lanes or, of 32 channels, 16.
  template <int GROUP>
  __device__ __forceinline__ Range range(int i, int lane) const {
    static_assert(GROUP == D || GROUP == 64 || GROUP == 32, "whole halves of warps");
    Range found = {-NEG_INF, NEG_INF, 0.f};
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      if ((GROUP < D && j != i) || (j * 32 + lane) * 2 >= D) continue;
      found.add({fminf(x[j].x, x[j].y), fmaxf(x[j].x, x[j].y), x[j].x * 0.f + x[j].y * 0.f});
    }
#pragma unroll
    for (int other = GROUP == 32 ? 8 : 16; other; other /= 2) found.add_lane(other);
    return found;
  }

  // Rounds to codes; `stride` numbers lie between the numbers of two groups, and middles behind all scales.
  template <class C>
  __device__ __forceinline__ void round(unsigned char* codes, typename C::Number* numbers, int stride, int lane) const {
    constexpr int GROUP = C::group(D), GROUPS = C::groups(D);
    Numbers found;
    float inverse;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2, group = d / GROUP;
      if (i == 0 || GROUP < D) {
        found = numbers_of<C>(range<GROUP>(i, lane));
        inverse = fabsf(found.scale) >= SMALLEST_SCALE ? 1.f / found.scale : 0.f;
      }
      if (d >= D) continue;
      if (d % GROUP == 0) {
        numbers[group * stride] = from_float<typename C::Number>(found.scale);
        if constexpr (C::AFFINE) numbers[(GROUPS + group) * stride] = from_float<typename C::Number>(found.middle);
      }
      const unsigned first = code_of<C>(x[i].x, found, inverse), second = code_of<C>(x[i].y, found, inverse);
      if constexpr (C::BITS == 4) codes[d / 2] = static_cast<unsigned char>(first | second << 4);
      else *reinterpret_cast<unsigned short*>(codes + d) = static_cast<unsigned short>(first | second << 8);
    }
  }

  // Its product with what a head is relative to, known to all lanes.
  template <class S>
  __device__ __forceinline__ float dot(const S* origin, float scale, int lane) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d >= D) continue;
      const Two<S> stored = *reinterpret_cast<const Two<S>*>(origin + d);
      sum += x[i].x * (scale * to_float(stored.x)) + x[i].y * (scale * to_float(stored.y));
    }
#pragma unroll
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, other);
    return sum;
  }

  template <class S>
  __device__ __forceinline__ void subtract(const S* from, float scale, int lane) {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d >= D) continue;
      const Two<S> stored = *reinterpret_cast<const Two<S>*>(from + d);
      x[i].x -= scale * to_float(stored.x), x[i].y -= scale * to_float(stored.y);
    }
  }
};
