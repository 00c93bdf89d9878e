// The inner loops of linears with AMX: a tile of up to 32 rows of activations times a slice of a panel, its weights as they
// are packed or unpacked for every other level, for a unit's words [K][32] are what the registers want. Eight registers are four
// of sums, which two of activations and two of weights meet in pairs.
//
//   integers  A unit's exact sum goes through memory into the vector registers, where it is scaled as in linear_tile.h: rows
//             are the same to the last bit as when they are streamed.
//   bf16      An instruction adds up to sixteen words of K to sums of float32. Which words are added together is fixed, so
//             that rows stay the same whatever stands beside them: sixteen by sixteen from the start of K. So bf16 meets
//             no other instruction, however few rows there are.
#pragma once
#include "amx.h"
#include "linear_tile.h"
#include "stream_tile.h"

#ifdef __AMX_TILE__
namespace amx {
constexpr int REGISTER_ROWS = 16;

// What a thread's registers are shaped for; none of rows where they are released.
struct Use {
    int rows = 0, words = 0;
};
inline thread_local Use use;

// Sums 0 to 3, activations 4 and 5, weights 6 and 7: [rows, at most 16][16], the rows beyond, [rows][words], [words][16].
INLINE void shape(int rows, int words) {
    if (use.rows == rows && use.words == words) return;
    Shapes shapes;
    auto set = [&](int t, int rows, int row_words) {
        shapes.rows[t] = uint8_t(rows), shapes.row_bytes[t] = uint16_t(rows ? 4 * row_words : 0);
    };
    const int first = std::min(rows, REGISTER_ROWS), second = rows - first;
    set(0, first, 16), set(1, first, 16), set(2, second, 16), set(3, second, 16);
    set(4, first, words), set(5, second, words), set(6, words, 16), set(7, words, 16);
    load_shapes(shapes);
    use = {rows, words};
}

// While one of these is there registers may be shaped. They are released with it: a thread that has them in use has 8 KB more
// to be saved when it is interrupted.
struct InUse {
    ~InUse() {
        if (use.rows) release_registers();
        use = {};
    }
};

// TALL: more rows than one register has.
template <bool TALL>
INLINE void zero_sums() {
    zero<0>(), zero<1>();
    if constexpr (TALL) zero<2>(), zero<3>();
}
constexpr long SUM_BYTES = 4 * PANEL, SECOND_SUMS = REGISTER_ROWS * PANEL;
template <bool TALL>
INLINE void load_sums(const float* c) {
    load<0>(c, SUM_BYTES), load<1>(c + 16, SUM_BYTES);
    if constexpr (TALL) load<2>(c + SECOND_SUMS, SUM_BYTES), load<3>(c + SECOND_SUMS + 16, SUM_BYTES);
}
template <bool TALL, class T>
INLINE void store_sums(T* c) {
    store<0>(c, SUM_BYTES), store<1>(c + 16, SUM_BYTES);
    if constexpr (TALL) store<2>(c + SECOND_SUMS, SUM_BYTES), store<3>(c + SECOND_SUMS + 16, SUM_BYTES);
}

struct Bytes {
    static constexpr int PER_WORD = 4;
    template <int C, int A, int B>
    INLINE void dot() { dot_bytes<C, A, B>(); }
};
struct Pairs {
    static constexpr int PER_WORD = 2;
    template <int C, int A, int B>
    INLINE void dot() { dot_bf16<C, A, B>(); }
};

// Sums += words of K [words][32] of weights times those of activations, of which a row has `row_words`.
template <class Words, bool TALL>
INLINE void add_products(const uint32_t* w, const uint32_t* x, long row_words) {
    load<6>(w, 4 * PANEL);
    load<4>(x, 4 * row_words);
    Words::template dot<0, 4, 6>();
    load<7>(w + 16, 4 * PANEL);
    Words::template dot<1, 4, 7>();
    if constexpr (TALL) {
        load<5>(x + REGISTER_ROWS * row_words, 4 * row_words);
        Words::template dot<2, 5, 6>();
        Words::template dot<3, 5, 7>();
    }
}

// Integer sums [rows][32] of one unit onto c, scaled.
template <bool OFFSETS>
INLINE void scale_sums(const int32_t* sums, const ActivationGroup& group, int rows, const float* scales,
                       const float* offsets, float* c) {
    constexpr int NV = PANEL / vec::LANES;
    vec::F scale[NV], offset[NV];
    UNROLL for (int v = 0; v < NV; v++) {
        scale[v] = vec::load(scales + v * vec::LANES);
        offset[v] = OFFSETS ? vec::load(offsets + v * vec::LANES) : vec::zero();
    }
    for (int r = 0; r < rows; r++, sums += PANEL, c += PANEL) {
        const vec::F row_scale = vec::set(group.scales[r]), row_factor = vec::set(OFFSETS ? group.factors[r] : 0);
        const vec::I start = vec::splat(group.starts + r);
        UNROLL for (int v = 0; v < NV; v++)
            add_group<OFFSETS>(vec::add(vec::word(sums + v * vec::LANES), start), scale[v], offset[v], row_scale,
                               row_factor, c + v * vec::LANES);
    }
}

// A unit's sums are scaled while the registers multiply the next one, which only then are stored in their place.
template <bool TALL, bool OFFSETS>
__attribute__((noinline)) void multiply_bytes(const Slice slice, int rows, const char* activations, float* c) {
    alignas(64) int32_t sums[AMX_ROWS * PANEL];
    const int words = std::min(slice.steps, AMX_WORDS);  // which divides steps: both are powers of two
    const long bytes = rows * activation_bytes(slice.steps, 1, slice.groups);
    auto scale = [&](long u) {
        const ActivationGroup group(activations + u * bytes, rows, slice.groups);
        scale_sums<OFFSETS>(sums, group, rows, slice.scales + u * PANEL, slice.offsets + u * PANEL, c);
    };
    shape(rows, words);
    for (long u = 0; u < slice.units; u++) {
        const ActivationGroup group(activations + u * bytes, rows, slice.groups);
        const uint32_t* w = (const uint32_t*)(slice.words + u * slice.stride);
        zero_sums<TALL>();
        for (int s = 0; s < slice.steps; s += words)
            add_products<Bytes, TALL>(w + s * PANEL, group.words + s, slice.steps);
        if (u > 0) scale(u - 1);
        store_sums<TALL>(sums);
    }
    scale(slice.units - 1);
}

// Words [units][32], from a multiple of AMX_WORDS on. Activations [units / 16][rows][16], what is left as [rows][rest].
template <bool TALL>
__attribute__((noinline)) void multiply_pairs(const uint32_t* w, long units, int rows, const uint32_t* x, float* c) {
    auto multiply = [&](long times, int words) {
        shape(rows, words);
        load_sums<TALL>(c);
        for (; times > 0; times--, w += words * PANEL, x += words * rows) add_products<Pairs, TALL>(w, x, words);
        store_sums<TALL>(c);
    };
    if (long times = units / AMX_WORDS) multiply(times, AMX_WORDS);
    if (int words = units % AMX_WORDS) multiply(1, words);
}

INLINE void multiply_pairs(const char* words, long units, int rows, const char* activations, float* c) {
    auto multiply = rows > REGISTER_ROWS ? multiply_pairs<true> : multiply_pairs<false>;
    multiply((const uint32_t*)words, units, rows, (const uint32_t*)activations, c);
}

// As Tile: bf16, which has no scales, or integers.
INLINE void multiply(const Slice& slice, int rows, const char* activations, float* c) {
    if (!slice.scales) return multiply_pairs(slice.words, slice.units, rows, activations, c);
    auto multiply = rows > REGISTER_ROWS ? slice.offsets ? multiply_bytes<true, true> : multiply_bytes<true, false>
                    : slice.offsets      ? multiply_bytes<false, true>
                                         : multiply_bytes<false, false>;
    multiply(slice, rows, activations, c);
}

// As StreamTile, of bf16.
INLINE void stream_pairs(const Streams& streams, long from, long to, int rows, const char* activations) {
    for (; from < to; from += AMX_WORDS, activations += 4L * AMX_WORDS * rows)
        for (long i = 0; i < streams.num; i++) {
            const char* words = streams.packed[i] + from * 4 * PANEL;
            const long units = std::min<long>(AMX_WORDS, to - from);
            prefetch_lines(words + STREAM_AHEAD, units * 4 * PANEL);
            multiply_pairs(words, units, rows, activations, streams.sums[i]);
        }
}
}  // namespace amx
#else
namespace amx {  // no job is
struct InUse {};
INLINE void multiply(const Slice&, int, const char*, float*) {}
INLINE void stream_pairs(const Streams&, long, long, int, const char*) {}
}  // namespace amx
#endif
