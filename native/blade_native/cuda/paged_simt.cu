// Paged attention without tensor cores, for models in float32: every sequence, ROWS rows of it (see attention.cuh) at a
// time.
#include "attention.cuh"

constexpr int SIMT_WARPS = 4;

// Four neighbouring channels as floats.
template <class S>
__device__ __forceinline__ float4 load4(const S* p) {
  const auto four = *reinterpret_cast<const Four<S>*>(p);
  return make_float4(to_float(four.x[0]), to_float(four.x[1]), to_float(four.x[2]), to_float(four.x[3]));
}

// Likewise of codes, a token's from `codes` on, with its numbers `stride` from each other.
template <class C, int D>
__device__ __forceinline__ float4 load4(const unsigned char* codes, const typename C::Number* numbers, int stride, int d) {
  float4 x;
  if constexpr (C::BITS == 4) {
    const int four = *reinterpret_cast<const unsigned short*>(codes + d / 2);
    const auto at = [&](int i) { return static_cast<float>((four >> 4 * i & 15 ^ 8) - 8); };
    x = make_float4(at(0), at(1), at(2), at(3));
  } else {
    x = load4(reinterpret_cast<const typename C::E*>(codes) + d);
  }
  const int group = d / C::group(D);
  x = scaled(x, to_float(numbers[group * stride]));
  if constexpr (C::AFFINE) {
    const float middle = to_float(numbers[(C::groups(D) + group) * stride]);
    x.x += middle, x.y += middle, x.z += middle, x.w += middle;
  }
  return x;
}

__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// The running state of ROWS rows on the LANES lanes that share a token: PER times four channels each.
template <int ROWS, int PER, int LANES>
struct SimtRows {
  float4 q[ROWS][PER], o[ROWS][PER];
  float m[ROWS], l[ROWS];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      m[r] = NEG_INF, l[r] = 0.f;
#pragma unroll
      for (int i = 0; i < PER; ++i) o[r][i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  // One token. Rows that do not see it pass seen = 0; all lanes of the warp call together.
  __device__ __forceinline__ void attend(const float4 (&k)[PER], const float4 (&v)[PER], unsigned seen, float scale) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float s = 0.f;
#pragma unroll
      for (int i = 0; i < PER; ++i) s += dot(q[r][i], k[i]);
#pragma unroll
      for (int other = LANES / 2; other; other /= 2) s += __shfl_xor_sync(FULL_WARP, s, other);
      if (!(seen >> r & 1)) continue;
      s *= scale;
      const float top = fmaxf(m[r], s), shrink = ptx::ex2(m[r] - top), weight = ptx::ex2(s - top);
      m[r] = top;
      l[r] = l[r] * shrink + weight;
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        o[r][i] = scaled(o[r][i], shrink);
        add_scaled(o[r][i], v[i], weight);
      }
    }
  }
};

// grid (B * num_tiles, KV, any number), block (32 * SIMT_WARPS). A warp reads 32 / LANES tokens at once.
// check: paged_simt{, _trees, _dual}<float, {float, signed char, __nv_fp8_e4m3}, {128, 64, 80, 96}, {4, 1}> | threads 128 | registers 128 | blocks 4
// check: paged_simt{_trees, , _dual}<float, {float, signed char, __nv_fp8_e4m3}, 256, {4, 1}> | threads 128 | registers 168 | blocks 3
// check: paged_simt{_dual, , _trees}<float, {kv_int4_affine, kv_int4, kv_int8_affine, kv_fp8_e5m2, kv_mix_i8i4, kv_mix_f843i4, kv_mix_f852i4}, {96, 64, 80, 128}, {4, 1}> | threads 128 | registers 128 | blocks 4
// check: paged_simt{_trees, , _dual}<float, {kv_int4_affine, kv_int4, kv_fp8_e5m2, kv_mix_i8i4, kv_mix_f843i4, kv_mix_f852i4}, 256, {4, 1}> | threads 128 | registers 168 | blocks 3
template <class T, class S, int D, int ROWS, class Args>
__device__ __forceinline__ void attend(const Args& args) {
  constexpr int LANES = D / 4 <= 16 ? 16 : 32, PER = (D / 4 + LANES - 1) / LANES, TOKENS = 32 / LANES;
  constexpr int PARTS = SIMT_WARPS * TOKENS, STEP = PARTS, AHEAD = 4 / PER;
  __shared__ __align__(16) float shared_o[PARTS * ROWS * (D + 8)];
  __shared__ float2 shared_ml[PARTS * ROWS];
  const int seq_index = blockIdx.x / args.num_tiles, first_row = blockIdx.x % args.num_tiles * ROWS;
  const Sequence seq = find_sequence(args, seq_index);
  if (first_row >= seq.num_rows) return;
  const int kv_head = blockIdx.y, lane = threadIdx.x % LANES, part = threadIdx.x / LANES;
  const int count = min(ROWS, seq.num_rows - first_row), first_position = seq.context - seq.num_queries;
  const int* table = args.block_tables + static_cast<long long>(seq_index) * args.table_stride;
  const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);

  SimtRows<ROWS, PER, LANES> rows;
  Sight sights[ROWS];
  auto load_q = [&](int r, int behind) {
    const T* head = row_query<D>(args, seq, kv_head, min(first_row + r, seq.num_rows - 1), behind);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int d = (i * LANES + lane) * 4;
      rows.q[r][i] = d < D ? load4(head + d) : zero;
    }
  };
  if constexpr (!DUAL<Args>) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sights[r] = find_sight(args, seq, first_row + r);
      load_q(r, 0);
    }
  }

  for (int chunk = blockIdx.z; chunk < seq.num_chunks; chunk += gridDim.z) {
    int end = min(seq.begin + (chunk + 1) * seq.chunk, seq.context);
    rows.reset();
    float shift[ROWS] = {};
#pragma unroll 1
    for (int behind = 0; behind < NUM_QUERIES<Args>; ++behind) {
      int begin = seq.begin + chunk * seq.chunk;
      if constexpr (DUAL<Args>) {
        const bool in_tree = args.ancestors != nullptr;
        const int low = first_position + (in_tree ? 0 : first_row / args.group);
        const int high = first_position + (first_row + count - 1) / args.group;
        const Common keys = find_common(args, low, high, first_position, in_tree, behind);
        end = min(min(begin + seq.chunk, seq.context), keys.any_to);
        begin = max(begin, keys.any_from);
        if (begin >= end) continue;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          load_q(r, behind);
          sights[r] = find_sight(args, seq, first_row + r, behind);
          if constexpr (RELATED<S>) {
            const float next = row_shift(args, seq, kv_head, first_row + r, behind) * args.scale_log2;
            rows.m[r] += shift[r] - next;
            shift[r] = next;
          }
        }
      }
      for (int first = begin; first < end; first += STEP * AHEAD) {
        float4 k[AHEAD][PER], v[AHEAD][PER];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          const int key = first + a * STEP + part;
          if constexpr (IN_PAGES<S>) {
            const bool valid = key < end;
            using Keys = typename Storage<S>::Keys;
            using Values = typename Storage<S>::Values;
            const Page<S, D> parts{args.block_size};
            const unsigned char* page = reinterpret_cast<const unsigned char*>(args.kv);
            if (valid) page += parts.start(table[key / args.block_size], kv_head, args.num_kv_heads);
            const int offset = key & (args.block_size - 1);
            const auto* key_numbers = reinterpret_cast<const typename Keys::Number*>(page + parts.key_numbers()) + offset;
            const auto* value_numbers =
                reinterpret_cast<const typename Values::Number*>(page + parts.value_numbers()) + offset;
#pragma unroll
            for (int i = 0; i < PER; ++i) {
              const int d = (i * LANES + lane) * 4;
              k[a][i] = v[a][i] = zero;
              if (valid && d < D) {
                k[a][i] = load4<Keys, D>(page + offset * parts.KEY_BYTES, key_numbers, args.block_size, d);
                v[a][i] = load4<Values, D>(page + parts.values() + offset * parts.VALUE_BYTES, value_numbers,
                                           args.block_size, d);
              }
            }
          } else {
            long long at = 0, to_values = static_cast<long long>(args.num_kv_heads) * args.block_size;
            float k_scale = 1.f, v_scale = 1.f;
            if (key < end) {
              at = cache_row(table[key / args.block_size], kv_head, args.num_kv_heads, args.block_size) +
                   (key & (args.block_size - 1));
              if constexpr (SCALED<S>) k_scale = args.scales[at], v_scale = args.scales[at + to_values];
            }
#pragma unroll
            for (int i = 0; i < PER; ++i) {
              const int d = (i * LANES + lane) * 4;
              k[a][i] = v[a][i] = zero;
              if (key < end && d < D) {
                k[a][i] = load4(args.kv + at * D + d);
                v[a][i] = load4(args.kv + (at + to_values) * D + d);
                if constexpr (SCALED<S>) k[a][i] = scaled(k[a][i], k_scale), v[a][i] = scaled(v[a][i], v_scale);
              }
            }
          }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          const int key = first + a * STEP + part;
          unsigned seen = 0;
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            bool before = key < sights[r].to;
            if constexpr (TREES<Args>) {
              const int place = key - first_position;
              before = before || (place >= 0 && place < 64 && sights[r].path >> place & 1);
            }
            seen |= unsigned(key < end && key >= sights[r].from && before) << r;
          }
          rows.attend(k[a], v[a], seen, args.scale_log2);
        }
      }
    }
    if constexpr (DUAL<Args>) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) rows.m[r] += shift[r];
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        const int d = (i * LANES + lane) * 4;
        if (d < D) *reinterpret_cast<float4*>(shared_o + (part * ROWS + r) * (D + 8) + d) = rows.o[r][i];
      }
      if (lane == 0) shared_ml[part * ROWS + r] = make_float2(rows.m[r], rows.l[r]);
    }
    __syncthreads();
    write_rows<D, PARTS, ROWS>(args, seq_index, seq, kv_head, chunk, first_row, count, shared_o, shared_ml, threadIdx.x,
                               SIMT_WARPS * 32);
    __syncthreads();  // before the next chunk overwrites them
  }
}

template <class T, class S, int D, int ROWS>
__global__ void __launch_bounds__(SIMT_WARPS * 32, D > 128 ? 3 : 4) paged_simt(const AttentionArgs<T, S> args) {
  attend<T, S, D, ROWS>(args);
}

template <class T, class S, int D, int ROWS>
__global__ void __launch_bounds__(SIMT_WARPS * 32, D > 128 ? 3 : 4) paged_simt_trees(const TreeArgs<T, S> args) {
  attend<T, S, D, ROWS>(args);
}

template <class T, class S, int D, int ROWS>
__global__ void __launch_bounds__(SIMT_WARPS * 32, D > 128 ? 3 : 4) paged_simt_dual(const DualArgs<T, S> args) {
  attend<T, S, D, ROWS>(args);
}
