// Attention of sixteen rows on one warp's tensor cores over keys in shared memory: scores, online softmax (Milakov and
// Gimelshein 2018), weighted sum, as in FlashAttention-2 (Dao 2023), with the fragments of mma.sync m16n8k16.
//
// 8-bit keys and values are widened in registers. ldmatrix moves pairs of bytes then, and hands a lane four neighbours:
// of a key four channels, so the channels of q are permuted to match (a dot product does not care); of the values two
// channels of two tokens, so the channels of two neighbouring tiles of the result are interleaved (see channel()).
#pragma once
#include "attention.cuh"

// Start copying tokens [first, first + COUNT), which share a 16-token run of one block, to a stage's rows from `row`;
// zeros from token `end` on, where a block may hold anything, NaN included. Called by a whole warp.
template <int D, int KEYS, int COUNT, class T, class S>
__device__ __forceinline__ void copy_tokens(const AttentionArgs<T, S>& args, int kv_head, int block, int first, int end,
                                            unsigned char* stage, int row) {
  using Stage = KeyStage<S, D, KEYS>;
  const int lane = threadIdx.x % 32, num_valid = end - first;
  const long long to_values = static_cast<long long>(args.num_kv_heads) * args.block_size;
  const long long at =
      cache_row(block, kv_head, args.num_kv_heads, args.block_size) + (first & (args.block_size - 1));
  const S* keys = args.kv + at * D;
  const S* values = keys + to_values * D;
  constexpr int STEP = 16 / sizeof(S);
#pragma unroll
  for (int i = lane; i < COUNT * Stage::CHUNKS; i += 32) {
    const int r = i / Stage::CHUNKS;
    unsigned char* to = stage + (row + r) * Stage::ROW + i % Stage::CHUNKS * 16;
    ptx::cp_async16(to, keys + i * STEP, r < num_valid);
    ptx::cp_async16(to + Stage::VALUES, values + i * STEP, r < num_valid);
  }
  if constexpr (SCALED<S>) {
    if (lane < COUNT / 2) {  // COUNT / 4 chunks of the keys' scales, as many of the values'
      const int kind = lane / (COUNT / 4), i = lane % (COUNT / 4) * 4;
      const float* from = args.scales + at + kind * to_values + i;
      ptx::cp_async16(stage + Stage::SCALES + (kind * KEYS + row + i) * 4, from, i < num_valid);
    }
  }
}

// Lane l = 4 * g + t holds of the result rows g (h = 0) and g + 8 (h = 1).
template <class T, class S, int D, int KEYS>
struct MmaRows {
  using Stage = KeyStage<S, D, KEYS>;
  static constexpr int STEPS = D / 16, SCORES = KEYS / 8, CHANNELS = D / 8;
  static constexpr bool BYTES = sizeof(S) == 1;
  static constexpr bool PARKED = D > 128;  // q in shared memory: in registers it would not fit beside o
  static constexpr int PARKED_BYTES = PARKED ? STEPS * 32 * 16 : 0;

  unsigned q[PARKED ? 1 : STEPS][4];
  uint4* parked;  // [STEPS][32], this warp's own
  float o[CHANNELS][4], m[2], l[2];
  int lane, g, t;

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] = 0.f;
    m[0] = m[1] = NEG_INF;
    l[0] = l[1] = 0.f;
  }

  // Rows [first_row, first_row + 16) of the sequence; those from num_rows on are zeros.
  __device__ __forceinline__ void load_q(const AttentionArgs<T, S>& args, const Sequence& seq, int kv_head,
                                         int first_row, uint4* park) {
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    parked = park;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + g + (i & 1) * 8;
        const long long token = seq.first_token + row / args.group;
        const T* head = args.q + token * args.q_stride + (kv_head * args.group + row % args.group) * D + step * 16;
        fragment[i] = 0;
        if (row >= seq.num_rows) continue;
        fragment[i] = BYTES ? pair(head, 4 * t + (i >> 1), 2) : pair(head, 2 * t + (i & 2) * 4, 1);
      }
      if constexpr (PARKED) {
        parked[step * 32 + lane] = make_uint4(fragment[0], fragment[1], fragment[2], fragment[3]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[step][i] = fragment[i];
      }
    }
  }

  static __device__ __forceinline__ unsigned pair(const T* x, int first, int distance) {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(x);
    return bits[first] | static_cast<unsigned>(bits[first + distance]) << 16;
  }

  // Channel of o[j][i].
  __device__ __forceinline__ int channel(int j, int i) const {
    return BYTES ? j / 2 * 16 + 4 * t + 2 * (i & 1) + (j & 1) : j * 8 + 2 * t + (i & 1);
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
    constexpr int AT_ONCE = BYTES ? 2 : 1;  // steps whose keys one ldmatrix brings
#pragma unroll
    for (int step = 0; step < STEPS; step += AT_ONCE) {
      unsigned a[AT_ONCE][4];
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) query(min(step + n, STEPS - 1), a[n]);
#pragma unroll
      for (int j = 0; j < SCORES; j += 2) {
        const int row = j * 8 + in_tile + (BYTES ? tile & 1 : tile >> 1) * 8;
        const int chunk = BYTES ? min(step + (tile >> 1), STEPS - 1) : step * 2 + (tile & 1);
        unsigned b[4];
        ptx::ldmatrix_x4<false>(b, stage + row * Stage::ROW + chunk * 16);
        if constexpr (BYTES) {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            if (step + n / 2 >= STEPS) continue;
            unsigned even, odd;
            widen<T, S>(b[n], even, odd);
            ptx::mma16816<T>(s[j + n % 2], a[n / 2], even, odd);
          }
        } else {
          ptx::mma16816<T>(s[j], a[0], b[0], b[1]);
          ptx::mma16816<T>(s[j + 1], a[0], b[2], b[3]);
        }
      }
    }
    if constexpr (SCALED<S>) {
#pragma unroll
      for (int j = 0; j < SCORES; ++j) {
        const float2 factor = scales(stage, 0, j);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] *= i & 1 ? factor.y : factor.x;
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
        if constexpr (SCALED<S>) {  // a hidden token's scale may be NaN
          const float2 factor = scales(stage, 1, column);
          a = a == 0.f ? 0.f : a * factor.x;
          b = b == 0.f ? 0.f : b * factor.y;
        }
        weights[n] = pack2<T>(a, b);
      }
      add_weighted(stage + Stage::VALUES + j * 8 * Stage::ROW, weights);
    }
  }

  // o += weights [16, 16] v [16, D]
  __device__ __forceinline__ void add_weighted(const unsigned char* values, const unsigned (&weights)[4]) {
    const int row = lane % 16;
#pragma unroll
    for (int c = 0; c < Stage::CHUNKS; c += 2) {
      const int chunk = min(c + (lane >> 4), Stage::CHUNKS - 1);
      unsigned b[4];
      ptx::ldmatrix_x4<true>(b, values + row * Stage::ROW + chunk * 16);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (c + n >= Stage::CHUNKS) continue;
        if constexpr (BYTES) {
          unsigned even[2], odd[2];
          widen<T, S>(b[2 * n], even[0], odd[0]);
          widen<T, S>(b[2 * n + 1], even[1], odd[1]);
          ptx::mma16816<T>(o[2 * (c + n)], weights, even[0], even[1]);
          ptx::mma16816<T>(o[2 * (c + n) + 1], weights, odd[0], odd[1]);
        } else {
          ptx::mma16816<T>(o[c + n], weights, b[2 * n], b[2 * n + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ float2 scales(const unsigned char* stage, int kind, int column) const {
    return reinterpret_cast<const float2*>(stage + Stage::SCALES + kind * KEYS * 4)[column * 4 + t];
  }

  // Hand the rows over through shared memory, for write_rows: o [16][D + 8], ml [16].
  __device__ __forceinline__ void spill(float* shared_o, float2* shared_ml, float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      l[h] += __shfl_xor_sync(FULL_WARP, l[h], 1);
      l[h] += __shfl_xor_sync(FULL_WARP, l[h], 2);
      if (t == 0) shared_ml[g + 8 * h] = make_float2(m[h] * scale, l[h]);
    }
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) shared_o[(g + (i >> 1) * 8) * (D + 8) + channel(j, i)] = o[j][i];
  }
};
