// Attention of sixteen rows on one warp's tensor cores over keys in shared memory: scores, online softmax (Milakov and
// Gimelshein 2018), weighted sum, as in FlashAttention-2 (Dao 2023), with the fragments of mma.sync m16n8k16.
//
// Keys and values of fewer bits are widened in registers. ldmatrix moves pairs of bytes then. Of 8 bits it hands a lane
// four neighbours: of a key four channels, so the channels of q are permuted to match (a dot product does not care); of
// the values two channels of two tokens, so the channels of two neighbouring tiles of the result are interleaved (see
// channel()). Of 4 bits it is twice as many channels, and four tiles.
#pragma once
#include "attention.cuh"

// Start copying COUNT tokens of BYTES each to rows of ROW bytes in shared memory; zeros from num_valid on.
template <int BYTES, int ROW, int COUNT>
__device__ __forceinline__ void copy_rows(const unsigned char* from, unsigned char* to, int num_valid) {
  constexpr int PART = BYTES % 16 ? 8 : 16, PARTS = BYTES / PART;
  static_assert(BYTES % PART == 0, "whole parts");
#pragma unroll
  for (int i = threadIdx.x % 32; i < COUNT * PARTS; i += 32)
    ptx::cp_async_part<PART>(to + i / PARTS * ROW + i % PARTS * PART, from + i * PART, i / PARTS < num_valid ? PART : 0);
}

// Likewise NUMBERS numbers of BYTES each of COUNT tokens: `stride` bytes from number to number, in shared memory STRIDE.
template <int NUMBERS, int BYTES, int STRIDE, int COUNT>
__device__ __forceinline__ void copy_numbers(const unsigned char* from, int stride, unsigned char* to, int num_valid) {
  constexpr int RUN = COUNT * BYTES, PART = RUN < 16 ? RUN : 16, PARTS = RUN / PART;
#pragma unroll
  for (int i = threadIdx.x % 32; i < NUMBERS * PARTS; i += 32) {
    const int at = i % PARTS * PART, valid = min(max(num_valid * BYTES - at, 0), PART);
    ptx::cp_async_part<PART>(to + i / PARTS * STRIDE + at, from + i / PARTS * stride + at, valid);
  }
}

template <class S, int D, int KEYS, int COUNT>
__device__ __forceinline__ void copy_page(const unsigned char* page, int block_size, int offset, int num_valid,
                                          unsigned char* stage, int row) {
  using Stage = KeyStage<S, D, KEYS>;
  using Parts = Page<S, D>;
  const Parts parts{block_size};
  copy_rows<Parts::KEY_BYTES, Stage::KEY_ROW, COUNT>(page + offset * Parts::KEY_BYTES, stage + row * Stage::KEY_ROW,
                                                     num_valid);
  copy_rows<Parts::VALUE_BYTES, Stage::VALUE_ROW, COUNT>(page + parts.values() + offset * Parts::VALUE_BYTES,
                                                         stage + Stage::VALUES + row * Stage::VALUE_ROW, num_valid);
  constexpr int KEY = Parts::KEY_NUMBER, VALUE = Parts::VALUE_NUMBER;
  copy_numbers<Stage::Keys::numbers(D), KEY, KEYS * KEY, COUNT>(
      page + parts.key_numbers() + offset * KEY, block_size * KEY, stage + Stage::KEY_NUMBERS + row * KEY, num_valid);
  copy_numbers<Stage::Values::numbers(D), VALUE, KEYS * VALUE, COUNT>(
      page + parts.value_numbers() + offset * VALUE, block_size * VALUE, stage + Stage::VALUE_NUMBERS + row * VALUE,
      num_valid);
}

// Start copying tokens [first, first + COUNT), which share a 16-token run of one block, to a stage's rows from `row`;
// zeros from token `end` on, where a block may hold anything, NaN included. Called by a whole warp.
template <int D, int KEYS, int COUNT, class T, class S>
__device__ __forceinline__ void copy_tokens(const AttentionArgs<T, S>& args, int kv_head, int block, int first, int end,
                                            unsigned char* stage, int row) {
  using Stage = KeyStage<S, D, KEYS>;
  const int lane = threadIdx.x % 32, num_valid = end - first;
  if constexpr (IN_PAGES<S>) {
    const unsigned char* pages = reinterpret_cast<const unsigned char*>(args.kv);
    copy_page<S, D, KEYS, COUNT>(pages + Page<S, D>{args.block_size}.start(block, kv_head, args.num_kv_heads),
                                 args.block_size, first & (args.block_size - 1), num_valid, stage, row);
  } else {
    const long long to_values = static_cast<long long>(args.num_kv_heads) * args.block_size;
    const long long at =
        cache_row(block, kv_head, args.num_kv_heads, args.block_size) + (first & (args.block_size - 1));
    const S* keys = args.kv + at * D;
    const S* values = keys + to_values * D;
    constexpr int STEP = 16 / sizeof(S);
#pragma unroll
    for (int i = lane; i < COUNT * Stage::KEY_CHUNKS; i += 32) {
      const int r = i / Stage::KEY_CHUNKS;
      unsigned char* to = stage + (row + r) * Stage::KEY_ROW + i % Stage::KEY_CHUNKS * 16;
      ptx::cp_async16(to, keys + i * STEP, r < num_valid);
      ptx::cp_async16(to + Stage::VALUES, values + i * STEP, r < num_valid);
    }
    if constexpr (SCALED<S>) {
      if (lane < COUNT / 2) {  // COUNT / 4 chunks of the keys' scales, as many of the values'
        const int kind = lane / (COUNT / 4), i = lane % (COUNT / 4) * 4;
        const float* from = args.scales + at + kind * to_values + i;
        ptx::cp_async16(stage + Stage::KEY_NUMBERS + (kind * KEYS + row + i) * 4, from, i < num_valid);
      }
    }
  }
}

// Lane l = 4 * g + t holds of the result rows g (h = 0) and g + 8 (h = 1).
template <class T, class S, int D, int KEYS>
struct MmaRows {
  using Stage = KeyStage<S, D, KEYS>;
  using Keys = typename Stage::Keys;
  using Values = typename Stage::Values;
  static constexpr int STEPS = Stage::KEY_CHUNKS * 8 / Keys::BITS, SCORES = KEYS / 8;
  static constexpr int TILES = 16 / Values::BITS, CHANNELS = Stage::VALUE_CHUNKS * TILES;  // tiles of a chunk, of all
  static constexpr bool KEY_MIDDLES = FACTORED<Keys> && Keys::AFFINE;
  static constexpr bool VALUE_MIDDLES = FACTORED<Values> && Values::AFFINE;
  static constexpr bool PARKED = D > 128;  // q in shared memory: in registers it would not fit beside o
  static constexpr int PARKED_BYTES = PARKED ? STEPS * 32 * 16 : 0;

  unsigned q[PARKED ? 1 : STEPS][4];
  uint4* parked;  // [STEPS][32], this warp's own
  float o[CHANNELS][4], m[2], l[2];
  float q_sum[2], offset[2];  // of the channels of q; of the weights times the values' middles: where there are these
  int lane, g, t;

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] = 0.f;
    m[0] = m[1] = NEG_INF;
    l[0] = l[1] = 0.f;
    if constexpr (VALUE_MIDDLES) offset[0] = offset[1] = 0.f;
  }

  // Rows [first_row, first_row + 16) of the sequence; those from num_rows on are zeros.
  template <class Args>
  __device__ __forceinline__ void load_q(const Args& args, const Sequence& seq, int kv_head, int first_row, uint4* park,
                                         int behind = 0) {
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    parked = park;
    if constexpr (KEY_MIDDLES) q_sum[0] = q_sum[1] = 0.f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + g + (i & 1) * 8;
        const T* head = row_query<D>(args, seq, kv_head, row, behind);
        fragment[i] = 0;
        if (row >= seq.num_rows) continue;
        if constexpr (Keys::BITS == 4) {
          const int first = step / 2 * 32 + 8 * t + step % 2 * 2 + (i >> 1);
          if (first < D) fragment[i] = pair(head, first, 4);
        } else {
          head += step * 16;
          fragment[i] = Keys::BITS == 8 ? pair(head, 4 * t + (i >> 1), 2) : pair(head, 2 * t + (i & 2) * 4, 1);
        }
        if constexpr (KEY_MIDDLES) {
          const T* two = reinterpret_cast<const T*>(&fragment[i]);
          q_sum[i & 1] += to_float(two[0]) + to_float(two[1]);
        }
      }
      if constexpr (PARKED) {
        parked[step * 32 + lane] = make_uint4(fragment[0], fragment[1], fragment[2], fragment[3]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[step][i] = fragment[i];
      }
    }
    if constexpr (KEY_MIDDLES) q_sum[0] = row_sum(q_sum[0]), q_sum[1] = row_sum(q_sum[1]);
  }

  // In dual chunks: go on with the queries for keys `behind` chunks before, and see what they see of these. Scores until
  // now were those of the queries `last`; NONE: there were none.
  template <class Args>
  __device__ __forceinline__ void turn(const Args& args, const Sequence& seq, int kv_head, int first_row, uint4* park,
                                       int behind, int& last, Sight (&sights)[2]) {
    load_q(args, seq, kv_head, first_row, park, behind);
#pragma unroll
    for (int h = 0; h < 2; ++h) sights[h] = find_sight(args, seq, first_row + g + 8 * h, behind);
    shift(args, seq, kv_head, first_row, last, 1.f);
    shift(args, seq, kv_head, first_row, behind, -1.f);
    last = behind;
  }

  // Add what scores with such queries lack, times `sign`.
  template <class Args>
  __device__ __forceinline__ void shift(const Args& args, const Sequence& seq, int kv_head, int first_row, int behind,
                                        float sign) {
    if constexpr (!RELATED<S>) return;
    if (behind == NONE) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) m[h] += sign * row_shift(args, seq, kv_head, first_row + g + 8 * h, behind);
  }

  // Over the lanes that share a row.
  static __device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
  }

  static __device__ __forceinline__ unsigned pair(const T* x, int first, int distance) {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(x);
    return bits[first] | static_cast<unsigned>(bits[first + distance]) << 16;
  }

  // Channel of o[j][i].
  __device__ __forceinline__ int channel(int j, int i) const {
    if constexpr (TILES == 4) return j / 4 * 32 + 8 * t + 4 * (i & 1) + j % 4;
    return TILES == 2 ? j / 2 * 16 + 4 * t + 2 * (i & 1) + (j & 1) : j * 8 + 2 * t + (i & 1);
  }

  // Attend to the stage's keys, the first of which is `key`. If masked, row h sees what sights[h] says; the first key
  // of the step is `start`.
  template <bool WITH_TREES>
  __device__ __forceinline__ void attend(const unsigned char* stage, int key, bool masked, const Sight (&sights)[2],
                                         int start, float scale) {
    float s[SCORES][4] = {};
    add_scores(stage, s);
    if (masked) mask<WITH_TREES>(key, sights, start, s);
    float top[2] = {m[0], m[1]}, base[2], shrink[2];
#pragma unroll
    for (int j = 0; j < SCORES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i >> 1] = fmaxf(top[i >> 1], s[j][i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(FULL_WARP, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(FULL_WARP, top[h], 2));
      base[h] = top[h] == NEG_INF ? 0.f : top[h] * scale;  // all is hidden so far: weights of 2^-inf
      shrink[h] = ptx::ex2(m[h] * scale - base[h]);
      l[h] *= shrink[h];
      if constexpr (VALUE_MIDDLES) offset[h] *= shrink[h];
    }
    if (__any_sync(FULL_WARP, top[0] != m[0] || top[1] != m[1])) {
#pragma unroll
      for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[j][i] *= shrink[i >> 1];
    }
    m[0] = top[0], m[1] = top[1];
    add_values(stage, s, base, scale);
  }

  template <bool WITH_TREES>
  __device__ __forceinline__ void mask(int key, const Sight (&sights)[2], int start, float (&s)[SCORES][4]) const {
    unsigned long long seen[2] = {};  // of the keys from the lane's first on
    if constexpr (WITH_TREES)
      for (int h = 0; h < 2; ++h) seen[h] = bits_from(sights[h].path, key + t * 2 - start);
#pragma unroll
    for (int j = 0; j < SCORES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = key + j * 8 + t * 2 + (i & 1);
        const bool before = at < sights[i >> 1].to || (WITH_TREES && seen[i >> 1] >> (j * 8 + (i & 1)) & 1);
        if (at < sights[i >> 1].from || !before) s[j][i] = NEG_INF;
      }
  }

  // The bits from bit `first` on; there are 0s on either side of the 64.
  static __device__ __forceinline__ unsigned long long bits_from(unsigned long long bits, int first) {
    if (first >= 64 || first <= -64) return 0;
    return first >= 0 ? bits >> first : bits << -first;
  }

  // s += q k^T, times the keys' scales
  __device__ __forceinline__ void add_scores(const unsigned char* stage, float (&s)[SCORES][4]) const {
    const int tile = lane / 8, in_tile = lane % 8;
    constexpr int CHUNK_STEPS = Keys::BITS == 16 ? 1 : 8 / Keys::BITS;
    constexpr int AT_ONCE = Keys::BITS == 16 ? 1 : 2 * CHUNK_STEPS;  // steps whose keys one ldmatrix brings
#pragma unroll
    for (int step = 0; step < STEPS; step += AT_ONCE) {
      unsigned a[AT_ONCE][4];
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) query(min(step + n, STEPS - 1), a[n]);
#pragma unroll
      for (int j = 0; j < SCORES; j += 2) {
        const int row = j * 8 + in_tile + (Keys::BITS < 16 ? tile & 1 : tile >> 1) * 8;
        const int chunk = Keys::BITS < 16 ? min(step / CHUNK_STEPS + (tile >> 1), Stage::KEY_CHUNKS - 1)
                                          : step * 2 + (tile & 1);
        unsigned b[4];
        ptx::ldmatrix_x4<false>(b, stage + row * Stage::KEY_ROW + chunk * 16);
        if constexpr (Keys::BITS < 16) {
          Factor<T, Keys> factors[2];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int at = step / CHUNK_STEPS + n / 2;
            if (at >= Stage::KEY_CHUNKS) continue;
            unsigned pairs[2 * CHUNK_STEPS];
            widen<T, Keys>(b[n], pairs);
            if constexpr (Keys::BITS == 4) {
              const auto* numbers = reinterpret_cast<const typename Keys::Number*>(stage + Stage::KEY_NUMBERS);
              if (n < 2 || starts_group<Keys>(at))
                factors[n % 2].load_one(numbers + group_of<Keys>(at) * KEYS + (j + n % 2) * 8 + g, TO_MIDDLE<Keys>);
#pragma unroll
              for (int i = 0; i < 4; ++i) pairs[i] = factors[n % 2].apply(pairs[i]);
            }
#pragma unroll
            for (int i = 0; i < CHUNK_STEPS; ++i)
              ptx::mma16816<T>(s[j + n % 2], a[n / 2 * CHUNK_STEPS + i], pairs[2 * i], pairs[2 * i + 1]);
          }
        } else {
          ptx::mma16816<T>(s[j], a[0], b[0], b[1]);
          ptx::mma16816<T>(s[j + 1], a[0], b[2], b[3]);
        }
      }
    }
    if constexpr (FACTORED<Keys>) {
#pragma unroll
      for (int j = 0; j < SCORES; ++j) {
        const float2 factor = numbers<Keys>(stage + Stage::KEY_NUMBERS, 0, j);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] *= i & 1 ? factor.y : factor.x;
        if constexpr (KEY_MIDDLES) {
          const float2 middle = numbers<Keys>(stage + Stage::KEY_NUMBERS, 1, j);
#pragma unroll
          for (int i = 0; i < 4; ++i) s[j][i] += q_sum[i >> 1] * (i & 1 ? middle.y : middle.x);
        }
      }
    }
  }

  __device__ __forceinline__ void query(int step, unsigned (&a)[4]) const {
    if constexpr (PARKED) {
      const uint4 x = parked[step * 32 + lane];
      a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q[step][i];
    }
  }

  // l += sum of the weights, o += weights v
  __device__ __forceinline__ void add_values(const unsigned char* stage, const float (&s)[SCORES][4],
                                             const float (&base)[2], float scale) {
#pragma unroll
    for (int j = 0; j < SCORES; j += 2) {
      unsigned weights[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int h = n & 1, column = j + (n >> 1);
        float a = ptx::ex2(s[column][2 * h] * scale - base[h]), b = ptx::ex2(s[column][2 * h + 1] * scale - base[h]);
        l[h] += a + b;
        if constexpr (VALUE_MIDDLES) {
          const float2 middle = numbers<Values>(stage + Stage::VALUE_NUMBERS, 1, column);
          offset[h] += a * middle.x + b * middle.y;
        }
        if constexpr (FACTORED<Values>) {  // a hidden token's scale may be NaN
          const float2 factor = numbers<Values>(stage + Stage::VALUE_NUMBERS, 0, column);
          a = a == 0.f ? 0.f : a * factor.x;
          b = b == 0.f ? 0.f : b * factor.y;
        }
        weights[n] = pack2<T>(a, b);
      }
      add_weighted(stage, stage + Stage::VALUES + j * 8 * Stage::VALUE_ROW, j, weights);
    }
  }

  // o += weights [16, 16] v [16, D], the values of the stage's tokens from 8 * j on
  __device__ __forceinline__ void add_weighted(const unsigned char* stage, const unsigned char* values, int j,
                                               const unsigned (&weights)[4]) {
    const int row = lane % 16;
    Factor<T, Values> factors[2];
#pragma unroll
    for (int c = 0; c < Stage::VALUE_CHUNKS; c += 2) {
      const int chunk = min(c + (lane >> 4), Stage::VALUE_CHUNKS - 1);
      unsigned b[4];
      ptx::ldmatrix_x4<true>(b, values + row * Stage::VALUE_ROW + chunk * 16);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (c + n >= Stage::VALUE_CHUNKS) continue;
        if constexpr (Values::BITS < 16) {
          unsigned pairs[2][TILES];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            widen<T, Values>(b[2 * n + half], pairs[half]);
            if constexpr (Values::BITS == 4) {
              const auto* numbers = reinterpret_cast<const typename Values::Number*>(stage + Stage::VALUE_NUMBERS);
              if (c + n == 0 || starts_group<Values>(c + n))
                factors[half].load_two(numbers + group_of<Values>(c + n) * KEYS + (j + half) * 8 + 2 * t,
                                       TO_MIDDLE<Values>);
#pragma unroll
              for (int i = 0; i < TILES; ++i) pairs[half][i] = factors[half].apply(pairs[half][i]);
            }
          }
#pragma unroll
          for (int i = 0; i < TILES; ++i)
            ptx::mma16816<T>(o[TILES * (c + n) + i], weights, pairs[0][i], pairs[1][i]);
        } else {
          ptx::mma16816<T>(o[c + n], weights, b[2 * n], b[2 * n + 1]);
        }
      }
    }
  }

  // Of codes of 4 bits, 32 channels to a chunk: its group, and whether it begins one. Numbers from scale to middle.
  template <class C>
  static constexpr int group_of(int chunk) {
    return chunk * 32 / C::group(D);
  }
  template <class C>
  static constexpr bool starts_group(int chunk) {
    return group_of<C>(chunk) != group_of<C>(chunk - 1);
  }
  template <class C>
  static constexpr int TO_MIDDLE = C::groups(D) * KEYS;

  // Scales (kind 0) or middles (1) of two neighbouring tokens of a column of scores.
  template <class C>
  __device__ __forceinline__ float2 numbers(const unsigned char* from, int kind, int column) const {
    if constexpr (sizeof(typename C::Number) == 4) {
      return reinterpret_cast<const float2*>(from + kind * KEYS * 4)[column * 4 + t];
    } else {
      const unsigned two = reinterpret_cast<const unsigned*>(from + kind * KEYS * 2)[column * 4 + t];
      constexpr float UNIT = 1 << C::TOP;  // widen_float8
      return make_float2(__int_as_float(two << 16) * UNIT, __int_as_float(two & 0xffff0000u) * UNIT);
    }
  }

  // Hand the rows over through shared memory, for write_rows: o [16][D + 8], ml [16].
  __device__ __forceinline__ void spill(float* shared_o, float2* shared_ml, float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      l[h] = row_sum(l[h]);
      if constexpr (VALUE_MIDDLES) offset[h] = row_sum(offset[h]);
      if (t == 0) shared_ml[g + 8 * h] = make_float2(m[h] * scale, l[h]);
    }
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (CHANNELS * 8 > D && channel(j, i) >= D) continue;  // what fills the last chunk up
        const float middle = VALUE_MIDDLES ? offset[i >> 1] : 0.f;
        shared_o[(g + (i >> 1) * 8) * (D + 8) + channel(j, i)] = VALUE_MIDDLES ? o[j][i] + middle : o[j][i];
      }
  }
};
