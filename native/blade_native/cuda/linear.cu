// Linears over weights of 4 or 8 bits for few rows: y = x W^T + b, x and the products in float16 or bfloat16, sums in
// float32, on the tensor cores. What a row's result is does not depend on the other rows.
//
// The weights are the A operand of mma m16n8k16, so one 16-byte load feeds a lane for 4 (8 bits: 2) steps and nothing
// is shuffled. A tile is 16 output channels by 64 numbers of K. Lane 4 g + t holds, for step s of the tile, element i
// (0..3) and half h (0, 1), the number at
//     channel g + 8 (i & 1),   K 16 s + 2 t + 8 (i >> 1) + h
// With 4 bits it is nibble i + 4 h of word s of the lane's 16 bytes; with 8 bits byte 2 (i & 1) + h of word
// 2 (s & 1) + (i >> 1) of the 16 bytes in plane s >> 1.
// A group's parameters for the 16 channels lie together: scales, then zeros or minima, [8][2] each, channel g + 8 j at
// [g][j].
#include "portable.cuh"

enum Kind {
  SYMMETRIC,  // scale * (q - 2^(bits - 1))
  ZEROS,      // scale * (q - zero)
  MINIMA,     // scale * q + minimum
  FP8         // scale * e4m3
};

constexpr int TILE_N = 16, TILE_K = 64, MIN_WARPS = 4;  // of a block
template <int GROUP, int KIND, int COLUMNS>
constexpr bool CROWDED = COLUMNS == 8 && (KIND == MINIMA || GROUP == 16);  // few registers to spare
template <int GROUP, int KIND, int COLUMNS>
constexpr int MAX_WARPS = CROWDED<GROUP, KIND, COLUMNS> ? 8 : 10;  // that registers suffice for

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

template <int BITS, int GROUP, int KIND>
struct Format {
  using Scale = typename Parameter<KIND>::Type;
  static constexpr int WEIGHT_BYTES = TILE_N * TILE_K * BITS / 8;  // of a tile
  static constexpr int PARAMETERS = KIND == ZEROS || KIND == MINIMA ? 2 : 1;
  static constexpr int GROUP_BYTES = PARAMETERS * TILE_N * static_cast<int>(sizeof(Scale));
};

// What a block has in shared memory: for each warp a ring of weights, for all of them one of x. A stage is as long as
// makes some 2 KiB for a warp, which pays for waiting on it, but not so long that many rows of x need too much room.
template <int BITS, int GROUP, int KIND, int COLUMNS>
struct Ring {
  using F = Format<BITS, GROUP, KIND>;
  static constexpr int STAGE = BITS == 4 && COLUMNS <= 2 ? 256 : 128;  // numbers of K
  static constexpr int STAGES = COLUMNS == 8 ? 3 : 4;
  static constexpr int WEIGHT_BYTES = STAGE / TILE_K * F::WEIGHT_BYTES;
  static constexpr int PARAMETER_BYTES = STAGE / GROUP * F::GROUP_BYTES;
  static constexpr int SLOT_BYTES = WEIGHT_BYTES + PARAMETER_BYTES;
  static constexpr int X_ROW = STAGE + 8;  // padded so that the rows of an 8x8 tile lie on different banks
  static constexpr int X_SLOT = 8 * COLUMNS * X_ROW;
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
  int* arrived;                 // one for each block of a slice, 0 before and after
  long long x_stride, y_stride;
  int num_rows, num_in, num_out;
  int slice;  // numbers of K that a block takes: a multiple of 128
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
__device__ __forceinline__ void add_slices(const LinearArgs<T>& args, int first_row, int first_channel, int width) {
  __shared__ int is_last;
  const int counter = blockIdx.y * gridDim.x + blockIdx.x, num_slices = gridDim.z;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(&args.arrived[counter], 1) == num_slices - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const int num_rows = min(ROWS, args.num_rows - first_row), num_channels = min(width, args.num_out - first_channel);
  const long long apart = static_cast<long long>(args.num_rows) * args.num_out;
  for (int i = threadIdx.x; i < num_rows * num_channels; i += blockDim.x) {
    const int row = first_row + i / num_channels, channel = first_channel + i % num_channels;
    const volatile float* from = args.partial + static_cast<long long>(row) * args.num_out + channel;
    float sum = 0.f;
#pragma unroll 4
    for (int slice = 0; slice < num_slices; ++slice) sum += from[slice * apart];
    store_result(args, row, channel, sum);
  }
  if (threadIdx.x == 0) args.arrived[counter] = 0;
}

// Starts the copies of a block's stages, in their order: a thread's part of x, and of its own warp's weights. What lies
// beyond the slice's end, and the weights of a tile that is not there, become zeros.
template <class T, int BITS, int GROUP, int KIND, int COLUMNS>
struct Loader {
  using F = Format<BITS, GROUP, KIND>;
  using R = Ring<BITS, GROUP, KIND, COLUMNS>;
  static constexpr int CHUNKS = R::STAGE / 8;  // of 16 bytes in a row of x
  static constexpr int PASSES = 8 * COLUMNS * CHUNKS / (MIN_WARPS * 32);
  unsigned char* ring;
  T* xs;
  const unsigned char *weight, *params;
  const T* x;
  long long x_step;  // from one pass's row to the next one's
  int weight_left, params_left, x_left, x_rows, rows_abreast, x_to, slot;

  __device__ __forceinline__ Loader(const LinearArgs<T>& args, int first_row, int tile, int begin, int length,
                                    unsigned char* own_ring, T* x_ring)
      : ring(own_ring), xs(x_ring), slot(0) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / CHUNKS, at = threadIdx.x % CHUNKS * 8;
    const long long first = static_cast<long long>(tile) * args.num_in + begin;
    const bool has_tile = tile * TILE_N < args.num_out;
    weight = args.weight + first / TILE_K * F::WEIGHT_BYTES + lane * 16;
    weight_left = has_tile ? length / TILE_K * F::WEIGHT_BYTES - lane * 16 : 0;
    params = args.params + first / GROUP * F::GROUP_BYTES + lane * 16;
    params_left = has_tile ? length / GROUP * F::GROUP_BYTES - lane * 16 : 0;
    x = args.x + (first_row + row) * args.x_stride + begin + at;
    x_left = length - at;
    x_rows = min(8 * COLUMNS, args.num_rows - first_row) - row;
    rows_abreast = blockDim.x / CHUNKS;
    x_step = rows_abreast * args.x_stride;
    x_to = row * R::X_ROW + at;
  }

  __device__ __forceinline__ void load() {
    const int lane = threadIdx.x % 32;
    unsigned char* to = ring + slot * R::SLOT_BYTES + lane * 16;
#pragma unroll
    for (int i = 0; i < R::WEIGHT_BYTES; i += 512) ptx::cp_async16(to + i, weight + i, i < weight_left);
#pragma unroll
    for (int i = 0; i < R::PARAMETER_BYTES; i += 512)
      if (lane * 16 < R::PARAMETER_BYTES - i)
        ptx::cp_async16(to + R::WEIGHT_BYTES + i, params + i, i < params_left);
    T* x_slot = xs + slot * R::X_SLOT + x_to;
    const T* from = x;
    int rows_left = x_rows;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      if (rows_left > 0) ptx::cp_async16(x_slot, from, x_left > 0);
      from += x_step, x_slot += rows_abreast * R::X_ROW, rows_left -= rows_abreast;
    }
    ptx::cp_async_commit();
    weight += R::WEIGHT_BYTES, weight_left -= R::WEIGHT_BYTES;
    params += R::PARAMETER_BYTES, params_left -= R::PARAMETER_BYTES;
    x += R::STAGE, x_left -= R::STAGE;
    slot = slot == R::STAGES - 1 ? 0 : slot + 1;
  }
};

// What of its slice a warp has summed, and how it gets there a stage at a time: 16 channels by 8 * COLUMNS rows.
template <class T, int BITS, int GROUP, int KIND, int COLUMNS>
struct TileSums {
  using F = Format<BITS, GROUP, KIND>;
  using R = Ring<BITS, GROUP, KIND, COLUMNS>;
  float sums[COLUMNS][4], scale[2], minimum[2], zero[2];
  float product[COLUMNS][4], total[COLUMNS][4];  // of the group at hand: of x with the integers, of x alone

  __device__ __forceinline__ void start_group(const unsigned char* parameters) {
    using Scale = typename F::Scale;
    const Scale* of_group = reinterpret_cast<const Scale*>(parameters) + threadIdx.x % 32 / 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float second = F::PARAMETERS == 2 ? to_float(of_group[TILE_N + j]) : 0.f;
      scale[j] = to_float(of_group[j]);
      minimum[j] = second;
      zero[j] = zero_of<T, BITS, KIND>(second);
    }
  }

  __device__ __forceinline__ void multiply(bool first, int column, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    add(first, product[column], a, b0, b1);
    if constexpr (KIND == MINIMA) {
      const unsigned one = pack2<T>(1.f, 1.f), ones[4] = {one, one, one, one};
      add(first, total[column], ones, b0, b1);
    }
  }

  static __device__ __forceinline__ void add(bool first, float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1) {
    if (first)
      ptx::mma16816_first<T>(c, a, b0, b1);
    else
      ptx::mma16816<T>(c, a, b0, b1);
  }

  __device__ __forceinline__ void end_group() {
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[column][i] += product[column][i] * scale[i >> 1];
        if constexpr (KIND == MINIMA) sums[column][i] += total[column][i] * minimum[i >> 1];
      }
  }

  // `slot`: a stage of weights and parameters; `x`: where this lane's row of ldmatrix begins in the stage of x.
  __device__ __forceinline__ void add_stage(const unsigned char* slot, const T* x, unsigned magic) {
    // The compiler mixes two parts' chains of products where there are registers for it.
    constexpr int PART = GROUP < TILE_K ? TILE_K : GROUP, AT_ONCE = R::STAGE / PART > 1 && COLUMNS * (KIND == MINIMA ? 2 : 1) <= 2 ? 2 : 1;
#pragma unroll AT_ONCE
    for (int part = 0; part < R::STAGE / PART; ++part)
      add_part<PART>(slot + part * (PART / TILE_K) * F::WEIGHT_BYTES,
                     slot + R::WEIGHT_BYTES + part * (PART / GROUP) * F::GROUP_BYTES, x + part * PART, magic);
  }

  template <int PART>
  __device__ __forceinline__ void add_part(const unsigned char* weights, const unsigned char* parameters, const T* x,
                                           unsigned magic) {
    constexpr int STEPS = GROUP / 16, WORDS = BITS / 4;
    unsigned words[BITS];
#pragma unroll
    for (int pair = 0; pair < PART / 32; ++pair) {  // of steps
      if (pair % 2 == 0) load_words(weights + pair / 2 * F::WEIGHT_BYTES, words);
      unsigned b[COLUMNS][4];
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column)
        ptx::ldmatrix_x4<false>(b[column], x + column * 8 * R::X_ROW + pair * 32);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * pair + s;
        if (step % STEPS == 0) start_group(parameters + step / STEPS * F::GROUP_BYTES);
        unsigned a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[i] = weight_pair<T, BITS, KIND>(words + step % 4 * WORDS, i, zero[i & 1], magic);
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
          multiply(step % STEPS == 0, column, a, b[column][2 * s], b[column][2 * s + 1]);
        if (step % STEPS == STEPS - 1) end_group();
        if (CROWDED<GROUP, KIND, COLUMNS>) __syncwarp();  // the compiler would have two groups' sums at hand
      }
    }
  }

  static __device__ __forceinline__ void load_words(const unsigned char* tile, unsigned (&words)[BITS]) {
#pragma unroll
    for (int plane = 0; plane < BITS / 4; ++plane) {
      const uint4 v = reinterpret_cast<const uint4*>(tile)[plane * 32 + threadIdx.x % 32];
      words[4 * plane] = v.x, words[4 * plane + 1] = v.y, words[4 * plane + 2] = v.z, words[4 * plane + 3] = v.w;
    }
  }
};

// Grid: (ceil(M / (8 * COLUMNS)), ceil(tiles of channels / warps), slices): blocks with the same weights run side by
// side, so that these come from memory once. COLUMNS: of 8 rows of x each. A warp owns one tile of channels, whatever
// the number of warps, which may so be what fills the device evenly. It streams its weights through its own ring; x
// comes through one for all warps.
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, {1, 2}> | threads 320 | registers 96 | shared 156672 | threads@86,89,120 128 | shared@86,89,120 82944
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, 4> | threads 320 | registers 168 | shared 96256
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32}, {SYMMETRIC, ZEROS}, 8> | threads 320 | registers 168 | shared 90624
// check: grouped_linear<{__nv_bfloat16, __half}, 4, 16, {SYMMETRIC, ZEROS}, 8> | threads 256 | registers 255 | shared 89088
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32, 16}, MINIMA, 8> | threads 256 | registers 255 | shared 89088
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, {1, 2}> | threads 320 | registers 96 | shared 119808 | threads@86,89,120 128 | shared@86,89,120 58368
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, 4> | threads 320 | registers 168 | shared 137216 | threads@86,89,120 128 | shared@86,89,120 75776
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32}, {SYMMETRIC, ZEROS}, 8> | threads 320 | registers 168 | shared 121344 | threads@86,89,120 128 | shared@86,89,120 79872
// check: grouped_linear<{__nv_bfloat16, __half}, 8, 16, {SYMMETRIC, ZEROS}, 8> | threads 256 | registers 255 | shared 113664 | threads@86,89,120 128 | shared@86,89,120 82944
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32, 16}, MINIMA, 8> | threads 256 | registers 255 | shared 113664 | threads@86,89,120 128 | shared@86,89,120 82944
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64}, FP8, {1, 2}> | threads 320 | registers 96 | shared 104448 | threads@86,89,120 128 | shared@86,89,120 52224
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64}, FP8, {4, 8}> | threads 320 | registers 168 | shared 121856 | threads@86,89,120 128 | shared@86,89,120 78336
template <class T, int BITS, int GROUP, int KIND, int COLUMNS>
__global__ void __launch_bounds__(MAX_WARPS<GROUP, KIND, COLUMNS> * 32, COLUMNS <= 2 ? 2 : 1)
    grouped_linear(const LinearArgs<T> args) {
  using R = Ring<BITS, GROUP, KIND, COLUMNS>;
  constexpr int ROWS = 8 * COLUMNS;
  DYN_SMEM(unsigned char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int first_row = blockIdx.x * ROWS, tile = blockIdx.y * num_warps + warp;
  const int begin = blockIdx.z * args.slice, length = min(args.slice, args.num_in - begin);
  unsigned char* ring = shared + warp * R::STAGES * R::SLOT_BYTES;
  T* xs = reinterpret_cast<T*>(shared + num_warps * R::STAGES * R::SLOT_BYTES);
  Loader<T, BITS, GROUP, KIND, COLUMNS> loader(args, first_row, tile, begin, length, ring, xs);
#pragma unroll
  for (int stage = 0; stage < R::STAGES - 1; ++stage) loader.load();

  // Not known to the compiler, and so in a register: mask and magic then fit into one instruction.
  const unsigned magic = MAGIC<T> + (args.num_in < 0);
  const T* x = xs + lane % 8 * R::X_ROW + lane / 8 * 8;  // what ldmatrix takes: four tiles side by side
  TileSums<T, BITS, GROUP, KIND, COLUMNS> tile_sums;
#pragma unroll
  for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
    for (int i = 0; i < 4; ++i) tile_sums.sums[column][i] = 0.f;
  int slot = 0;
  for (int left = length; left > 0; left -= R::STAGE) {
    ptx::cp_async_wait<R::STAGES - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the slot that is filled next
    loader.load();
    tile_sums.add_stage(ring + slot * R::SLOT_BYTES, x + slot * R::X_SLOT, magic);
    slot = slot == R::STAGES - 1 ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + column * 8 + 2 * (lane % 4) + (i & 1);
      const int channel = tile * TILE_N + lane / 4 + 8 * (i >> 1);
      if (row >= args.num_rows || channel >= args.num_out) continue;
      const float sum = tile_sums.sums[column][i];
      if (gridDim.z == 1)
        store_result(args, row, channel, sum);
      else
        args.partial[(static_cast<long long>(blockIdx.z) * args.num_rows + row) * args.num_out + channel] = sum;
    }
  if (gridDim.z > 1)
    add_slices<T, ROWS>(args, first_row, blockIdx.y * num_warps * TILE_N, num_warps * TILE_N);
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
  const int g = row % 8, j = row % TILE_N / 8, lane = 4 * g + k % 8 / 2, element = 2 * (k % 16 / 8) + j;
  const unsigned char* of_tile = args.weight + (tile * (args.num_in / TILE_K) + k / TILE_K) * F::WEIGHT_BYTES;
  const int word = k % TILE_K / 16 * BITS / 4;
  const unsigned* of_lane = reinterpret_cast<const unsigned*>(of_tile) + word / 4 * 128 + lane * 4 + word % 4;
  using Scale = typename F::Scale;
  const Scale* of_group =
      reinterpret_cast<const Scale*>(args.params + (tile * (args.num_in / GROUP) + k / GROUP) * F::GROUP_BYTES) + 2 * g + j;
  const float scale = to_float(of_group[0]), second = to_float(of_group[(F::PARAMETERS - 1) * TILE_N]);
  const float zero = zero_of<T, BITS, KIND>(second), minimum = KIND == MINIMA ? second : 0.f;
  uint2 packed;
  unsigned* to = &packed.x;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // the next two numbers are the next lane's
    const unsigned words[2] = {of_lane[4 * half], of_lane[4 * half + BITS / 8]};
    const auto pair = as_pair<T>(weight_pair<T, BITS, KIND>(words, element, zero, MAGIC<T>));
    to[half] = pack2<T>(to_float(pair.x) * scale + minimum, to_float(pair.y) * scale + minimum);
  }
  *reinterpret_cast<uint2*>(args.out + static_cast<long long>(blockIdx.x) * args.num_in + k) = packed;
}
