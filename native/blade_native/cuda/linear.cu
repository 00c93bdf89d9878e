// Linears over weights of 4 or 8 bits for few rows: y = x W^T + b, x and the products in float16 or bfloat16, sums in
// float32, on the tensor cores. What a row's result is does not depend on the other rows.
//
// The weights are the A operand of mma m16n8k16, so one 16-byte load feeds a lane for 4 (8 bits: 2) steps and nothing
// is shuffled. A tile is 16 output channels by 64 numbers of K. Lane 4 g + t holds, for step s of the tile, element i
// (0..3) and half h (0, 1), the number at
//     channel g + 8 (i & 1),   K 16 s + 4 t + 2 (i >> 1) + h
// so that the matching x of a lane are 4 neighbours. With 4 bits it is nibble i + 4 h of word s of the lane's 16 bytes;
// with 8 bits byte 2 (i & 1) + h of word 2 (s & 1) + (i >> 1) of the 16 bytes in plane s >> 1.
// A group's parameters for the 16 channels lie together: scales, then zeros or minima, [8][2] each, channel g + 8 j at
// [g][j].
#include "portable.cuh"

enum Kind {
  SYMMETRIC,  // scale * (q - 2^(bits - 1))
  ZEROS,      // scale * (q - zero)
  MINIMA,     // scale * q + minimum
  FP8         // scale * e4m3
};

constexpr int LINEAR_WARPS = 8, TILE_N = 16, TILE_K = 64, BLOCK_N = LINEAR_WARPS * TILE_N, MAX_SLICE = 512;

template <class T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<__nv_bfloat16> = true;

template <int KIND>
struct Parameter {
  using Type = __half;
};
template <>
struct Parameter<FP8> {
  using Type = float;
};

// What one tile takes, in memory and in a warp's ring.
template <int BITS, int GROUP, int KIND>
struct Format {
  using Scale = typename Parameter<KIND>::Type;
  static constexpr int WEIGHT_BYTES = TILE_N * TILE_K * BITS / 8;
  static constexpr int PARAMETERS = KIND == ZEROS || KIND == MINIMA ? 2 : 1;
  static constexpr int GROUP_BYTES = PARAMETERS * TILE_N * static_cast<int>(sizeof(Scale));
  static constexpr int GROUPS = GROUP < TILE_K ? TILE_K / GROUP : 1;  // whose parameters a tile needs
  static constexpr int STEPS = TILE_K / 16 / GROUPS;                  // of a tile with the same parameters
  static constexpr int SLOT_BYTES = WEIGHT_BYTES + GROUPS * GROUP_BYTES;
  static constexpr int STAGES = BITS == 4 ? 4 : 3;
};

// ---- two 16-bit numbers at a time

template <class T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

template <class T>
__device__ __forceinline__ typename Pair<T>::Type as_pair(unsigned bits) {
  return *reinterpret_cast<const typename Pair<T>::Type*>(&bits);
}

template <class T>
__device__ __forceinline__ unsigned as_bits(typename Pair<T>::Type pair) {
  return *reinterpret_cast<const unsigned*>(&pair);
}

// A number q as the low bits of a larger one costs no conversion: 128 + q in bfloat16 is 0x4300 | q for q < 128,
// 1024 + q in float16 is 0x6400 | q for q < 1024. The subtraction is exact.
template <class T>
constexpr unsigned MAGIC = IS_BF16<T> ? 0x43004300u : 0x64006400u;
template <class T>
constexpr float MAGIC_VALUE = IS_BF16<T> ? 128.f : 1024.f;
constexpr float FLOAT_MAGIC_VALUE = 8388608.f;  // 0x4b000000 | q in float32, for bfloat16's 8 bits

// Element i of a step from its words, one with 4 bits, two with 8. `zero` is what `zero_of` made for its channel, `magic`
// is MAGIC<T>.
template <class T, int BITS, int KIND>
__device__ __forceinline__ unsigned weight_pair(const unsigned* words, int i, float zero, unsigned magic) {
  if constexpr (BITS == 4) {
    const unsigned bits = (words[0] >> (4 * i) & 0x000f000fu) | magic;
    return as_bits<T>(__hsub2(as_pair<T>(bits), as_pair<T>(pack2<T>(zero, zero))));
  } else {
    const unsigned word = words[i >> 1], second = i & 1;  // bytes 0 and 1 or 2 and 3
    if constexpr (KIND == FP8) {  // the exponent of e4m3 in place, then its bias corrected: exact, subnormals included
      const unsigned high = __byte_perm(word, 0, second ? 0x3424 : 0x1404);  // each the upper byte of its half
      const unsigned rest = (high & 0x7f007f00u) >> (IS_BF16<T> ? 4 : 1);
      const unsigned factor = IS_BF16<T> ? 0x7b807b80u : 0x5c005c00u;  // 2^120, 2^8
      return as_bits<T>(__hmul2(as_pair<T>((high & 0x80008000u) | rest), as_pair<T>(factor)));
    } else if constexpr (IS_BF16<T>) {  // integers of 8 bits: the upper halves of the floats are all of them
      const float low = __uint_as_float(__byte_perm(word, 0x4b000000u, second ? 0x7442 : 0x7440)) - zero;
      const float high = __uint_as_float(__byte_perm(word, 0x4b000000u, second ? 0x7443 : 0x7441)) - zero;
      return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
    } else {
      const unsigned bits = __byte_perm(word, 0x64646464u, second ? 0x4342 : 0x4140);
      return as_bits<T>(__hsub2(as_pair<T>(bits), as_pair<T>(pack2<T>(zero, zero))));
    }
  }
}

template <class T, int BITS, int KIND>
__device__ __forceinline__ float zero_of(float stored) {
  const float zero = KIND == ZEROS ? stored : KIND == SYMMETRIC ? (BITS == 4 ? 8.f : 128.f) : 0.f;
  return zero + (BITS == 8 && IS_BF16<T> ? FLOAT_MAGIC_VALUE : MAGIC_VALUE<T>);
}

template <class T>
struct LinearArgs {
  T* y;                         // [M, N], rows `y_stride` apart; null: y_float is wanted
  float* y_float;               // the same in float32
  const T* x;                   // [M, K], rows `x_stride` apart
  const T* bias;                // [N] or null
  const unsigned char* weight;  // [ceil(N / 16), K / 64] tiles
  const unsigned char* params;  // [ceil(N / 16), K / GROUP] of a group each
  float* partial;               // [slices, M, N] float32, where K is cut into slices
  int* arrived;                 // [ceil(N / 128), ceil(M / rows of a block)], 0 before and after
  long long x_stride, y_stride;
  int num_rows, num_in, num_out;
  int slice;  // numbers of K that a block takes: a multiple of 64, at most MAX_SLICE
};

template <class T>
__device__ __forceinline__ void store_result(const LinearArgs<T>& args, int row, int channel, float sum) {
  if (args.bias) sum += to_float(args.bias[channel]);
  if (args.y)
    args.y[row * args.y_stride + channel] = from_float<T>(sum);
  else
    args.y_float[row * args.y_stride + channel] = sum;
}

// The last block of those that share channels and rows adds up their slices, always in the same order.
template <class T, int ROWS>
__device__ __forceinline__ void add_slices(const LinearArgs<T>& args, int first_row, int first_channel) {
  __shared__ int is_last;
  const int counter = blockIdx.y * gridDim.x + blockIdx.x, num_slices = gridDim.z;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(&args.arrived[counter], 1) == num_slices - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < ROWS * BLOCK_N; i += blockDim.x) {
    const int row = first_row + i / BLOCK_N, channel = first_channel + i % BLOCK_N;
    if (row >= args.num_rows || channel >= args.num_out) continue;
    const volatile float* from = args.partial + static_cast<long long>(row) * args.num_out + channel;
    float sum = 0.f;
#pragma unroll 4
    for (int slice = 0; slice < num_slices; ++slice)
      sum += from[static_cast<long long>(slice) * args.num_rows * args.num_out];
    store_result(args, row, channel, sum);
  }
  if (threadIdx.x == 0) args.arrived[counter] = 0;
}

// Grid: (ceil(M / (8 * COLUMNS)), ceil(N / 128), slices): blocks with the same weights run side by side, so that these
// come from memory once. A warp owns one tile of channels and streams it through its own ring in shared memory; x of the
// slice lies beside the rings, for all warps. COLUMNS: of 8 rows of x each.
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, {2, 1}> | threads 256 | registers 64 | shared 41472 | blocks 2
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {64, 128, 32, 16}, {SYMMETRIC, ZEROS}, {2, 1}> | threads 256 | registers 64 | shared 47616 | blocks 2
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {64, 128, 32, 16}, MINIMA, {2, 1}> | threads 256 | registers 80 | shared 47616 | blocks 2
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32}, FP8, {2, 1}> | threads 256 | registers 64 | shared 47616 | blocks 2
template <class T, int BITS, int GROUP, int KIND, int COLUMNS>
__global__ void __launch_bounds__(LINEAR_WARPS * 32, BITS == 8 && KIND == MINIMA && COLUMNS == 2 ? 3 : 4)
    grouped_linear(const LinearArgs<T> args) {
  using F = Format<BITS, GROUP, KIND>;
  constexpr int ROWS = 8 * COLUMNS;
  DYN_SMEM(unsigned char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
  const int first_row = blockIdx.x * ROWS, tile = blockIdx.y * LINEAR_WARPS + warp;
  const int begin = blockIdx.z * args.slice, length = min(args.slice, args.num_in - begin);
  const int x_width = args.slice + 16;  // padded so that 4 rows lie on different banks
  unsigned char* ring = shared + warp * F::STAGES * F::SLOT_BYTES;
  T* xs = reinterpret_cast<T*>(shared + LINEAR_WARPS * F::STAGES * F::SLOT_BYTES);  // [ROWS][x_width]

  constexpr int ABREAST = LINEAR_WARPS * 32 / (MAX_SLICE / 8);  // rows of x that are loaded at a time
  const int at = threadIdx.x % (MAX_SLICE / 8) * 8;
#pragma unroll
  for (int i = 0; i < ROWS; i += ABREAST) {
    const int row = i + threadIdx.x / (MAX_SLICE / 8);
    const bool there = first_row + row < args.num_rows;
    const T* from = args.x + (there ? first_row + row : 0) * args.x_stride + begin + at;
    if (at < length) ptx::cp_async16(xs + row * x_width + at, from, there);
  }
  ptx::cp_async_commit();

  const int num_stages = tile * TILE_N < args.num_out ? length / TILE_K : 0;
  const unsigned char* weight =
      args.weight + (static_cast<long long>(tile) * (args.num_in / TILE_K) + begin / TILE_K) * F::WEIGHT_BYTES;
  const unsigned char* params = args.params + static_cast<long long>(tile) * (args.num_in / GROUP) * F::GROUP_BYTES;
  auto load = [&](int stage) {
    if (stage < num_stages) {
      unsigned char* slot = ring + stage % F::STAGES * F::SLOT_BYTES;
#pragma unroll
      for (int i = lane * 16; i < F::WEIGHT_BYTES; i += 512)
        ptx::cp_async16(slot + i, weight + static_cast<long long>(stage) * F::WEIGHT_BYTES + i);
      if (lane * 16 < F::GROUPS * F::GROUP_BYTES)
        ptx::cp_async16(slot + F::WEIGHT_BYTES + lane * 16,
                        params + (begin + stage * TILE_K) / GROUP * F::GROUP_BYTES + lane * 16);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < F::STAGES - 1; ++stage) load(stage);
  ptx::cp_async_wait<F::STAGES - 1>();
  __syncthreads();  // everybody's part of x is there

  // Not known to the compiler, and so in a register: mask and magic then fit into one instruction.
  const unsigned magic = MAGIC<T> + (args.num_in < 0);
  float sums[COLUMNS][4] = {};
  for (int stage = 0; stage < num_stages; ++stage) {
    ptx::cp_async_wait<F::STAGES - 2>();
    __syncwarp();  // the stage is there for all lanes, and all are done with the slot that is filled next
    load(stage + F::STAGES - 1);
    const unsigned char* slot = ring + stage % F::STAGES * F::SLOT_BYTES;
    const T* x = xs + g * x_width + stage * TILE_K + 4 * t;
    unsigned words[BITS];
#pragma unroll
    for (int plane = 0; plane < BITS / 4; ++plane) {
      const uint4 v = reinterpret_cast<const uint4*>(slot)[plane * 32 + lane];
      words[4 * plane] = v.x, words[4 * plane + 1] = v.y, words[4 * plane + 2] = v.z, words[4 * plane + 3] = v.w;
    }
#pragma unroll
    for (int group = 0; group < F::GROUPS; ++group) {
      using Scale = typename F::Scale;
      const Scale* of_group = reinterpret_cast<const Scale*>(slot + F::WEIGHT_BYTES + group * F::GROUP_BYTES) + 2 * g;
      float zero[2], product[COLUMNS][4] = {}, total[COLUMNS][4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j)
        zero[j] = zero_of<T, BITS, KIND>(KIND == ZEROS ? to_float(of_group[(F::PARAMETERS - 1) * TILE_N + j]) : 0.f);
#pragma unroll
      for (int s = group * F::STEPS; s < (group + 1) * F::STEPS; ++s) {
        unsigned a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = weight_pair<T, BITS, KIND>(words + s * BITS / 4, i, zero[i & 1], magic);
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
          const uint2 b = *reinterpret_cast<const uint2*>(x + column * 8 * x_width + 16 * s);
          ptx::mma16816<T>(product[column], a, b.x, b.y);
          if constexpr (KIND == MINIMA) {
            const unsigned one = pack2<T>(1.f, 1.f), ones[4] = {one, one, one, one};
            ptx::mma16816<T>(total[column], ones, b.x, b.y);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
          sums[column][i] += product[column][i] * to_float(of_group[i >> 1]);
          if constexpr (KIND == MINIMA) sums[column][i] += total[column][i] * to_float(of_group[TILE_N + (i >> 1)]);
        }
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + column * 8 + 2 * t + (i & 1), channel = tile * TILE_N + g + 8 * (i >> 1);
      if (row >= args.num_rows || channel >= args.num_out) continue;
      if (gridDim.z == 1)
        store_result(args, row, channel, sums[column][i]);
      else
        args.partial[(static_cast<long long>(blockIdx.z) * args.num_rows + row) * args.num_out + channel] =
            sums[column][i];
    }
  if (gridDim.z > 1) add_slices<T, ROWS>(args, first_row, blockIdx.y * BLOCK_N);
}

template <class T>
struct RowsArgs {
  T* out;                       // [R, K]
  const long long* ids;         // [R], which rows; null: the first R
  const unsigned char* weight;  // as in LinearArgs
  const unsigned char* params;
  int num_in;
};

// Rows of the matrix itself: embeddings, and what a library's GEMM takes. Grid: (R, blocks of 1024 numbers of K).
// check: dequantized_rows<{__nv_bfloat16, __half}, {4, 8}, {32, 16, 64, 128}, {MINIMA, ZEROS, SYMMETRIC}> | threads 256 | registers 48 | shared 0 | blocks 4
// check: dequantized_rows<{__nv_bfloat16, __half}, 8, {32, 64, 128}, FP8> | threads 256 | registers 48 | shared 0 | blocks 4
template <class T, int BITS, int GROUP, int KIND>
__global__ void __launch_bounds__(256) dequantized_rows(const RowsArgs<T> args) {
  using F = Format<BITS, GROUP, KIND>;
  const int k = (blockIdx.y * 256 + threadIdx.x) * 4;
  if (k >= args.num_in) return;
  const long long row = args.ids ? args.ids[blockIdx.x] : blockIdx.x, tile = row / TILE_N;
  const int g = row % 8, j = row % TILE_N / 8, lane = 4 * g + k % 16 / 4;
  const unsigned char* of_tile = args.weight + (tile * (args.num_in / TILE_K) + k / TILE_K) * F::WEIGHT_BYTES;
  const int word = k % TILE_K / 16 * BITS / 4;
  unsigned words[BITS / 4];
#pragma unroll
  for (int i = 0; i < BITS / 4; ++i)
    words[i] = reinterpret_cast<const unsigned*>(of_tile)[word / 4 * 128 + lane * 4 + word % 4 + i];
  using Scale = typename F::Scale;
  const Scale* of_group =
      reinterpret_cast<const Scale*>(args.params + (tile * (args.num_in / GROUP) + k / GROUP) * F::GROUP_BYTES) + 2 * g + j;
  const float scale = to_float(of_group[0]), second = to_float(of_group[(F::PARAMETERS - 1) * TILE_N]);
  const float zero = zero_of<T, BITS, KIND>(second), minimum = KIND == MINIMA ? second : 0.f;
  uint2 packed;
  unsigned* to = &packed.x;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const typename Pair<T>::Type pair = as_pair<T>(weight_pair<T, BITS, KIND>(words, 2 * half + j, zero, MAGIC<T>));
    to[half] = pack2<T>(to_float(pair.x) * scale + minimum, to_float(pair.y) * scale + minimum);
  }
  *reinterpret_cast<uint2*>(args.out + static_cast<long long>(blockIdx.x) * args.num_in + k) = packed;
}
