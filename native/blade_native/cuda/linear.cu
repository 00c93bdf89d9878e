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

constexpr int TILE_N = 16, TILE_K = 64;
// A block takes 8 * COLUMNS rows of x. For few rows memory is what counts: a warp has one tile, and the number of warps
// is what fills the device evenly. For more rows it is the way of x from shared memory to the tensor cores: a warp uses
// what it reads of x for two tiles, and blocks are small, so that one works while another one waits.
constexpr int MIN_WARPS = 4, MAX_WARPS = 10;  // of a block for few rows; one for more has MIN_WARPS
template <int COLUMNS>
constexpr int TILES = COLUMNS == 1 ? 1 : 2;  // of a warp
template <int COLUMNS>
constexpr int MAX_THREADS = (COLUMNS == 1 ? MAX_WARPS : MIN_WARPS) * 32;
template <int GROUP, int COLUMNS>
constexpr int BLOCKS = COLUMNS == 4 && GROUP > 16 ? 3 : COLUMNS == 2 ? 4 : 2;  // on an SM, as far as registers go

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

// What a block has in shared memory: for each warp a ring of weights, for all of them one of x. A slot is a stage: the
// weights of the warp's tiles, then their parameters. A stage is as long as makes some 2 KiB for a warp, which pays for
// waiting on it.
template <int BITS, int GROUP, int KIND, int COLUMNS>
struct Ring {
  using F = Format<BITS, GROUP, KIND>;
  static constexpr int STAGE = BITS == 4 && COLUMNS == 1 ? 256 : 128;  // numbers of K
  static constexpr int STAGES = COLUMNS == 8 || (BITS == 8 && COLUMNS > 1) ? 3 : 4;
  static constexpr int WEIGHT_BYTES = STAGE / TILE_K * F::WEIGHT_BYTES;  // of a tile
  static constexpr int PARAMETER_BYTES = STAGE / GROUP * F::GROUP_BYTES;
  static constexpr int SLOT_BYTES = TILES<COLUMNS> * (WEIGHT_BYTES + PARAMETER_BYTES);
  static constexpr int X_ROW = STAGE + 8;  // padded so that the rows of an 8x8 tile lie on different banks
  static constexpr int X_SLOT = 8 * COLUMNS * X_ROW;
  // Minima are multiplied by sums of x over a group. Few rows' warps take them in passing. More rows' share them: they
  // are summed a stage ahead, and lie in shared memory by stage (even or odd), group and row.
  static constexpr bool SHARED_TOTALS = KIND == MINIMA && COLUMNS > 1;
  static constexpr int TOTALS = STAGE / GROUP * 8 * COLUMNS;  // of a stage
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
  float* partial;               // [slices, M, N rounded up to tiles] float32, where K is cut into slices
  int* arrived;                 // one for each block of a slice, 0 before and after
  const long long* matrices;    // [M] or null: which of several matrices, one behind the other, a row is multiplied by
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

template <class T>
__device__ __forceinline__ long long padded_channels(const LinearArgs<T>& args) {
  return (args.num_out + TILE_N - 1) / TILE_N * TILE_N;
}

// The last block of those that share channels and rows adds up their slices, always in the same order: a thread 8
// channels of a row, AT_ONCE slices read before they are waited for.
template <class T, int ROWS>
__device__ __forceinline__ void add_slices(const LinearArgs<T>& args, int first_row, int first_channel, int width) {
  constexpr int AT_ONCE = ROWS >= 32 ? 8 : 4;
  __shared__ int is_last;
  const int counter = blockIdx.y * gridDim.x + blockIdx.x, num_slices = gridDim.z;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(&args.arrived[counter], 1) == num_slices - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const long long padded = padded_channels(args), apart = args.num_rows * padded;
  const int num_rows = min(ROWS, args.num_rows - first_row);
  const int num_eights = min(width, static_cast<int>(padded) - first_channel) / 8;
  for (int i = threadIdx.x; i < num_rows * num_eights; i += blockDim.x) {
    const int row = first_row + i / num_eights, channel = first_channel + i % num_eights * 8;
    const float* from = args.partial + row * padded + channel;
    float sums[8] = {};
    for (int first = 0; first < num_slices; first += AT_ONCE) {
      float4 part[AT_ONCE][2];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          part[j][half] = first + j < num_slices
                              ? reinterpret_cast<const float4*>(from + (first + j) * apart)[half]
                              : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* to = sums + 4 * half;
          to[0] += part[j][half].x, to[1] += part[j][half].y, to[2] += part[j][half].z, to[3] += part[j][half].w;
        }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (channel + j < args.num_out) store_result(args, row, channel + j, sums[j]);
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
  static constexpr int OF_TILE = R::PARAMETER_BYTES / 16;  // chunks of a tile's parameters in a stage
  unsigned char* ring;
  T* xs;
  const unsigned char *weight, *params;
  const T* x;
  long long x_step;                // from one pass's row to the next one's
  int weight_apart, params_apart;  // from one tile to the next one
  int num_tiles, left, x_rows, x_to, slot;

  __device__ __forceinline__ Loader(const LinearArgs<T>& args, int first_row, int tile, int begin, int length,
                                    unsigned char* own_ring, T* x_ring)
      : ring(own_ring), xs(x_ring), slot(0) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / CHUNKS, at = threadIdx.x % CHUNKS * 8;
    num_tiles = (args.num_out + TILE_N - 1) / TILE_N - tile;
    left = length;
    weight_apart = args.num_in / TILE_K * F::WEIGHT_BYTES;
    params_apart = args.num_in / GROUP * F::GROUP_BYTES;
    weight = args.weight + static_cast<long long>(tile) * weight_apart + begin / TILE_K * F::WEIGHT_BYTES + lane * 16;
    params = args.params + static_cast<long long>(tile) * params_apart + begin / GROUP * F::GROUP_BYTES;
    x = args.x + (first_row + row) * args.x_stride + begin + at;
    x_rows = min(8 * COLUMNS, args.num_rows - first_row) - row;
    x_step = rows_abreast() * args.x_stride;
    x_to = row * R::X_ROW + at;
  }

  static __device__ __forceinline__ int rows_abreast() {
    return (COLUMNS == 1 ? blockDim.x : MAX_THREADS<COLUMNS>) / CHUNKS;
  }

  __device__ __forceinline__ void load() {
    const int lane = threadIdx.x % 32;
    unsigned char* to = ring + slot * R::SLOT_BYTES + lane * 16;
#pragma unroll
    for (int tile = 0; tile < TILES<COLUMNS>; ++tile)
#pragma unroll
      for (int i = 0; i < R::WEIGHT_BYTES; i += 512)
        ptx::cp_async16(to + tile * R::WEIGHT_BYTES + i, weight + tile * weight_apart + i,
                        tile < num_tiles && i / F::WEIGHT_BYTES * TILE_K < left);
    to += TILES<COLUMNS> * R::WEIGHT_BYTES;
#pragma unroll
    for (int first = 0; first < TILES<COLUMNS> * OF_TILE; first += 32) {
      const int tile = (first + lane) / OF_TILE, at = (first + lane) % OF_TILE * 16;
      const bool valid = tile < num_tiles && at / F::GROUP_BYTES * GROUP < left;
      if (tile < TILES<COLUMNS>) ptx::cp_async16(to + first * 16, params + tile * params_apart + at, valid);
    }
    T* x_slot = xs + slot * R::X_SLOT + x_to;
    const T* from = x;
    const bool valid = static_cast<int>(threadIdx.x) % CHUNKS * 8 < left;
    int rows_left = x_rows;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      if (rows_left > 0) ptx::cp_async16(x_slot, from, valid);
      from += x_step, x_slot += rows_abreast() * R::X_ROW, rows_left -= rows_abreast();
    }
    ptx::cp_async_commit();
    weight += R::WEIGHT_BYTES, params += R::PARAMETER_BYTES, x += R::STAGE, left -= R::STAGE;
    slot = slot == R::STAGES - 1 ? 0 : slot + 1;
  }
};

// c = or += A B.
template <class T>
__device__ __forceinline__ void add_product(bool first, float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                            unsigned b1) {
  if (first)
    ptx::mma16816_first<T>(c, a, b0, b1);
  else
    ptx::mma16816<T>(c, a, b0, b1);
}

// The same for A of ones: each row of c is the sum of the columns of B.
template <class T>
__device__ __forceinline__ void add_total(bool first, float (&c)[4], unsigned b0, unsigned b1) {
  const unsigned one = pack2<T>(1.f, 1.f), ones[4] = {one, one, one, one};
  add_product<T>(first, c, ones, b0, b1);
}

// Sums of a stage of x over its groups, [group][row]: a warp those of every fourth 8 rows. `x`: where this lane's row of
// ldmatrix begins, whose four tiles lie side by side.
template <class T, class R, int GROUP, int COLUMNS>
__device__ __forceinline__ void add_totals(const T* x, float* totals) {
  constexpr int STEPS = GROUP / 16;
  const int lane = threadIdx.x % 32;
  for (int column = threadIdx.x / 32; column < COLUMNS; column += MIN_WARPS) {
    float total[4];
#pragma unroll
    for (int pair = 0; pair < R::STAGE / 32; ++pair) {
      unsigned b[4];
      ptx::ldmatrix_x4<false>(b, x + column * 8 * R::X_ROW + pair * 32);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * pair + s;
        add_total<T>(step % STEPS == 0, total, b[2 * s], b[2 * s + 1]);
        if (step % STEPS == STEPS - 1 && lane < 4)
          reinterpret_cast<float2*>(totals + (step / STEPS * COLUMNS + column) * 8)[lane] =
              make_float2(total[0], total[1]);
      }
    }
  }
}

// What of its slice a warp has summed, and how it gets there a stage at a time: 16 * TILES channels by 8 * COLUMNS rows.
template <class T, int BITS, int GROUP, int KIND, int COLUMNS>
struct TileSums {
  using F = Format<BITS, GROUP, KIND>;
  using R = Ring<BITS, GROUP, KIND, COLUMNS>;
  static constexpr int TILES = ::TILES<COLUMNS>, STEPS = GROUP / 16, PAIRS = (COLUMNS + 1) / 2;  // of 8 rows
  float sums[TILES][COLUMNS][4], scale[TILES][2], minimum[TILES][2], zero[TILES][2];
  float product[TILES][COLUMNS][4];  // of the group at hand: of x with the integers

  // A parameter of the group, of this lane's two channels in each tile.
  static __device__ __forceinline__ void read(const unsigned char* parameters, int which, float (&to)[TILES][2]) {
    using Scale = typename F::Scale;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        to[tile][j] = to_float(reinterpret_cast<const Scale*>(
            parameters + tile * R::PARAMETER_BYTES)[which * TILE_N + threadIdx.x % 32 / 4 * 2 + j]);
  }

  __device__ __forceinline__ void start_group(const unsigned char* parameters) {
    float stored[TILES][2] = {};
    if constexpr (KIND == ZEROS) read(parameters, 1, stored);
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) zero[i / 2][i % 2] = zero_of<T, BITS, KIND>(stored[i / 2][i % 2]);
  }

  // What `end_group` wants; while the group's last step multiplies it is on its way.
  __device__ __forceinline__ void read_factors(const unsigned char* parameters) {
    read(parameters, 0, scale);
    if constexpr (KIND == MINIMA) read(parameters, 1, minimum);
  }

  // `total`: sums of x over the group, of this lane's two rows.
  __device__ __forceinline__ void end_group(int column, float2 total) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[tile][column][i] += product[tile][column][i] * scale[tile][i >> 1];
        if constexpr (KIND == MINIMA) sums[tile][column][i] += (i & 1 ? total.y : total.x) * minimum[tile][i >> 1];
      }
  }

  __device__ __forceinline__ void widen(const unsigned (&words)[TILES][BITS], int step, unsigned magic,
                                        unsigned (&a)[TILES][4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[tile][i] = weight_pair<T, BITS, KIND>(words[tile] + step % 4 * (BITS / 4), i, zero[tile][i & 1], magic);
  }

  static __device__ __forceinline__ void load_words(const unsigned char* weights, unsigned (&words)[TILES][BITS]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int plane = 0; plane < BITS / 4; ++plane) {
        const uint4 v =
            reinterpret_cast<const uint4*>(weights + tile * R::WEIGHT_BYTES)[plane * 32 + threadIdx.x % 32];
        unsigned* to = words[tile] + 4 * plane;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
  }

  // `slot`: a stage of weights and parameters; `x`: where this lane's row of ldmatrix begins in the stage of x;
  // `totals`: the stage's, where they are shared.
  __device__ __forceinline__ void add_stage(const unsigned char* slot, const T* x, const float* totals,
                                            unsigned magic) {
    if constexpr (COLUMNS == 1) {
      // The compiler mixes two parts' chains of products where there are registers for it.
      constexpr int PART = GROUP < TILE_K ? TILE_K : GROUP, AT_ONCE = KIND == MINIMA && GROUP == 16 ? 1 : 2;
#pragma unroll AT_ONCE
      for (int part = 0; part < R::STAGE / PART; ++part)
        add_part<PART>(slot + part * (PART / TILE_K) * F::WEIGHT_BYTES,
                       slot + R::WEIGHT_BYTES + part * (PART / GROUP) * F::GROUP_BYTES, x + part * PART, magic);
    } else {
      // Of many rows a part at a time, else the compiler has more groups' sums at hand than there are registers for.
      constexpr int PART = GROUP < R::STAGE && COLUMNS >= 4 ? TILE_K : R::STAGE;
#pragma unroll 1
      for (int part = 0; part < R::STAGE / PART; ++part)
        add_steps<PART>(slot + part * (PART / TILE_K) * F::WEIGHT_BYTES,
                        slot + TILES * R::WEIGHT_BYTES + part * (PART / GROUP) * F::GROUP_BYTES, x + part * PART,
                        totals + part * (PART / GROUP) * 8 * COLUMNS, magic);
    }
  }

  // Few rows: ldmatrix takes two steps of 8 rows.
  template <int PART>
  __device__ __forceinline__ void add_part(const unsigned char* weights, const unsigned char* parameters, const T* x,
                                           unsigned magic) {
    unsigned words[1][BITS];
    float total[4] = {};
#pragma unroll
    for (int pair = 0; pair < PART / 32; ++pair) {
      if (pair % 2 == 0) load_words(weights + pair / 2 * F::WEIGHT_BYTES, words);
      unsigned b[4];
      ptx::ldmatrix_x4<false>(b, x + pair * 32);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * pair + s;
        const bool first = step % STEPS == 0;
        if (first) start_group(parameters + step / STEPS * F::GROUP_BYTES);
        unsigned a[1][4];
        widen(words, step, magic, a);
        if (step % STEPS == STEPS - 1) read_factors(parameters + step / STEPS * F::GROUP_BYTES);
        add_product<T>(first, product[0][0], a[0], b[2 * s], b[2 * s + 1]);
        if constexpr (KIND == MINIMA) add_total<T>(first, total, b[2 * s], b[2 * s + 1]);
        if (step % STEPS == STEPS - 1) end_group(0, make_float2(total[0], total[1]));
      }
    }
  }

  // More rows: ldmatrix takes one step of 16 rows, and what a step needs is on its way while the one before multiplies.
  template <int PART>
  __device__ __forceinline__ void add_steps(const unsigned char* weights, const unsigned char* parameters, const T* x,
                                            const float* totals, unsigned magic) {
    constexpr int NUM_STEPS = PART / 16;
    constexpr int AHEAD = COLUMNS == 8 && GROUP == 32 && KIND == MINIMA ? 0 : 1;  // steps, as registers allow
    unsigned words[TILES][BITS], b[1 + AHEAD][PAIRS][4];
    load_words(weights, words);
    if (AHEAD) load_fragments(x, b[0]);
#pragma unroll
    for (int step = 0; step < NUM_STEPS; ++step) {
      const bool more = step + 1 < NUM_STEPS, first = step % STEPS == 0;
      if (more || !AHEAD) load_fragments(x + (step + AHEAD) * 16, b[(step + AHEAD) % (1 + AHEAD)]);
      if (first) start_group(parameters + step / STEPS * F::GROUP_BYTES);
      unsigned a[TILES][4];
      widen(words, step, magic, a);
      if (step % STEPS == STEPS - 1) read_factors(parameters + step / STEPS * F::GROUP_BYTES);
      if (step % 4 == 3 && more) load_words(weights + (step + 1) / 4 * F::WEIGHT_BYTES, words);
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const unsigned* of_column = b[step % (1 + AHEAD)][column / 2] + column % 2 * 2;
          add_product<T>(first, product[tile][column], a[tile], of_column[0], of_column[1]);
        }
      if (step % STEPS != STEPS - 1) continue;
      const float2* of_group = reinterpret_cast<const float2*>(totals + step / STEPS * 8 * COLUMNS) + threadIdx.x % 4;
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column)
        end_group(column, R::SHARED_TOTALS ? of_group[column * 4] : make_float2(0.f, 0.f));
    }
  }

  static __device__ __forceinline__ void load_fragments(const T* x, unsigned (&b)[PAIRS][4]) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) ptx::ldmatrix_x4<false>(b[i], x + i * 16 * R::X_ROW);
  }
};

// What is left of the arguments for one row, with a matrix of its own.
template <class T, int BITS, int GROUP, int KIND>
__device__ __forceinline__ LinearArgs<T> of_row(LinearArgs<T> args, int row) {
  using F = Format<BITS, GROUP, KIND>;
  const long long first_tile = args.matrices[row] * ((args.num_out + TILE_N - 1) / TILE_N);
  args.weight += first_tile * (args.num_in / TILE_K) * F::WEIGHT_BYTES;
  args.params += first_tile * (args.num_in / GROUP) * F::GROUP_BYTES;
  args.x += row * args.x_stride;
  if (args.y) args.y += row * args.y_stride;
  if (args.y_float) args.y_float += row * args.y_stride;
  args.num_rows = 1;
  return args;
}

// Grid: (ceil(M / (8 * COLUMNS)), ceil(tiles of channels / those of a block), slices), or with a matrix for each row
// (M, the same, 1): blocks with the same weights run
// side by side, so that these come from memory once. A warp streams its weights through its own ring; x comes through
// one for all warps.
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, 1> | threads 320 | registers 96 | shared 139776 | threads@86,89,120 128 | shared@86,89,120 66048
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, 2> | threads 128 | registers 128 | shared 67584
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32}, {SYMMETRIC, ZEROS, MINIMA}, 4> | threads 128 | registers 168 | shared 86016
// check: grouped_linear<{__nv_bfloat16, __half}, 4, 16, {SYMMETRIC, ZEROS, MINIMA}, 4> | threads 128 | registers 255 | shared 86016
// check: grouped_linear<{__nv_bfloat16, __half}, 4, {128, 64, 32}, {SYMMETRIC, ZEROS, MINIMA}, 8> | threads 128 | registers 255 | shared 84992
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, 1> | threads 320 | registers 96 | shared 111104 | threads@86,89,120 128 | shared@86,89,120 49664
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32, 16}, {SYMMETRIC, ZEROS, MINIMA}, 2> | threads 128 | registers 128 | shared 75520
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32}, {SYMMETRIC, ZEROS, MINIMA}, 4> | threads 128 | registers 168 | shared 89600
// check: grouped_linear<{__nv_bfloat16, __half}, 8, 16, {SYMMETRIC, ZEROS, MINIMA}, 4> | threads 128 | registers 255 | shared 89600
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64, 32}, {SYMMETRIC, ZEROS, MINIMA}, 8> | threads 128 | registers 255 | shared 109568 | arch 80,90,100
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64}, FP8, 1> | threads 320 | registers 96 | shared 95744
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64}, FP8, 2> | threads 128 | registers 128 | shared 65280
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64}, FP8, 4> | threads 128 | registers 168 | shared 78336
// check: grouped_linear<{__nv_bfloat16, __half}, 8, {128, 64}, FP8, 8> | threads 128 | registers 255 | shared 104448 | arch 80,90,100
template <class T, int BITS, int GROUP, int KIND, int COLUMNS>
__global__ void __launch_bounds__(MAX_THREADS<COLUMNS>, BLOCKS<GROUP, COLUMNS>) grouped_linear(const LinearArgs<T> given) {
  using R = Ring<BITS, GROUP, KIND, COLUMNS>;
  constexpr int ROWS = 8 * COLUMNS, OF_WARP = TILES<COLUMNS>;
  DYN_SMEM(unsigned char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const bool alone = COLUMNS == 1 && given.matrices;
  const LinearArgs<T> args = alone ? of_row<T, BITS, GROUP, KIND>(given, blockIdx.x) : given;
  const int first_row = alone ? 0 : blockIdx.x * ROWS, first_tile = (blockIdx.y * num_warps + warp) * OF_WARP;
  const int begin = blockIdx.z * args.slice, length = min(args.slice, args.num_in - begin);
  unsigned char* ring = shared + warp * R::STAGES * R::SLOT_BYTES;
  T* xs = reinterpret_cast<T*>(shared + num_warps * R::STAGES * R::SLOT_BYTES);
  float* totals = reinterpret_cast<float*>(xs + R::STAGES * R::X_SLOT);
  Loader<T, BITS, GROUP, KIND, COLUMNS> loader(args, first_row, first_tile, begin, length, ring, xs);
#pragma unroll
  for (int stage = 0; stage < R::STAGES - 1; ++stage) loader.load();

  // Not known to the compiler, and so in a register: mask and magic then fit into one instruction.
  const unsigned magic = MAGIC<T> + (args.num_in < 0);
  const T* side_by_side = xs + lane % 8 * R::X_ROW + lane / 8 * 8;  // rows that ldmatrix takes: 8 of four tiles
  const T* two_by_two = xs + (lane / 16 * 8 + lane % 8) * R::X_ROW + lane / 8 % 2 * 8;  // 16 of two
  const T* x = COLUMNS == 1 ? side_by_side : two_by_two;
  TileSums<T, BITS, GROUP, KIND, COLUMNS> tile_sums;
#pragma unroll
  for (int i = 0; i < OF_WARP * COLUMNS * 4; ++i) tile_sums.sums[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] = 0.f;
  if constexpr (R::SHARED_TOTALS) {
    ptx::cp_async_wait<R::STAGES - 2>();
    __syncthreads();
    add_totals<T, R, GROUP, COLUMNS>(side_by_side, totals);
  }
  int slot = 0, odd = 0;
  for (int left = length; left > 0; left -= R::STAGE) {
    // The stage is there for all, and all are done with the slot that is filled next. For totals so is the next stage.
    ptx::cp_async_wait<R::STAGES - 2 - R::SHARED_TOTALS>();
    __syncthreads();  // the stage is there
    loader.load();
    const int next = slot == R::STAGES - 1 ? 0 : slot + 1;
    if constexpr (R::SHARED_TOTALS)
      add_totals<T, R, GROUP, COLUMNS>(side_by_side + next * R::X_SLOT, totals + (odd ^ 1) * R::TOTALS);
    tile_sums.add_stage(ring + slot * R::SLOT_BYTES, x + slot * R::X_SLOT, totals + odd * R::TOTALS, magic);
    slot = next, odd ^= 1;
  }
  ptx::cp_async_wait<0>();

  const long long padded = padded_channels(args);
#pragma unroll
  for (int i = 0; i < OF_WARP * COLUMNS * 4; ++i) {
    const int tile = i / 4 / COLUMNS, column = i / 4 % COLUMNS;
    const int row = first_row + column * 8 + 2 * (lane % 4) + (i & 1);
    const int channel = (first_tile + tile) * TILE_N + lane / 4 + (i & 2) * 4;
    if (row >= args.num_rows || channel >= args.num_out) continue;
    const float sum = tile_sums.sums[tile][column][i % 4];
    if (gridDim.z == 1)
      store_result(args, row, channel, sum);
    else
      args.partial[(static_cast<long long>(blockIdx.z) * args.num_rows + row) * padded + channel] = sum;
  }
  if (gridDim.z > 1) {
    const int width = num_warps * OF_WARP * TILE_N;
    add_slices<T, ROWS>(args, first_row, blockIdx.y * width, width);
  }
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
