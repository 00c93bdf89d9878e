// Blocks as GGUF files have them go straight into panels, in one pass over the mapped file.
//
// Layouts after https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h; what each becomes is what
// blade/checkpoint/gguf/grouped.py makes of it, byte for byte.
#include <algorithm>

#include "panel.h"
#include "parallel.h"

namespace {
constexpr int AHEAD = 256;                        // bytes of a row; too many rows are read at once for the hardware to see
constexpr uint64_t BYTES = 0x0101010101010101;  // 1 in each byte

INLINE uint64_t eight(const uint8_t* from) {
    uint64_t bytes;
    memcpy(&bytes, from, 8);
    return bytes;
}

// A channel's block: integers, eight to a word; scales and offsets of its groups, as the format of its kind says.
struct Block {
    uint64_t q[32];
    uint8_t scales[16], offsets[16];
    uint16_t scale, offset;  // the halves that codes count
};

// 8 n bytes of two fields of four bits: all the low ones, then all the high ones.
template <int N>
INLINE void nibbles(const uint8_t* packed, uint64_t* q) {
    for (int i = 0; i < N; i++) {
        uint64_t bytes = eight(packed + 8 * i);
        q[i] = bytes & 15 * BYTES, q[i + N] = bytes >> 4 & 15 * BYTES;
    }
}

// 8 n bytes of four fields of two bits: all the lowest ones first.
template <int N>
INLINE void pairs(const uint8_t* packed, uint64_t* q) {
    for (int i = 0; i < N; i++)
        for (int f = 0; f < 4; f++) q[f * N + i] = eight(packed + 8 * i) >> 2 * f & 3 * BYTES;
}

// Bits of four bytes, one after the other, each to a byte of q, as 16.
INLINE void fifth_bits(const uint8_t* packed, uint64_t* q) {
    for (int i = 0; i < 4; i++) {
        uint64_t spread = packed[i] * BYTES & 0x8040201008040201;  // bit j stays in byte j alone
        q[i] |= (spread + 0x7f * BYTES) >> 3 & 16 * BYTES;         // and carries into bit 7
    }
}

// Eight scales and eight minima of six bits, in twelve bytes; the minima are subtracted.
INLINE void codes_k(const uint8_t* from, Block& to) {
    const uint8_t *d = from + 4, *m = d + 4, *high = d + 8;
    for (int i = 0; i < 4; i++) {
        to.scales[i] = d[i] & 63, to.offsets[i] = m[i] & 63;
        to.scales[i + 4] = (high[i] & 15) | (d[i] >> 2 & 48);
        to.offsets[i + 4] = high[i] >> 4 | (m[i] >> 2 & 48);
    }
    memcpy(&to.scale, from, 2);
    memcpy(&to.offset, from + 2, 2);
    to.offset ^= 0x8000;
}

// Of each kind: the bytes of a block, its numbers, the bits of one and how many share a scale.
struct Q4_0 {
    static constexpr int NUM_BYTES = 18, SIZE = 32, BITS = 4, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        memcpy(to.scales, from, 2);
        nibbles<2>(from + 2, to.q);
    }
};
struct Q4_1 {
    static constexpr int NUM_BYTES = 20, SIZE = 32, BITS = 4, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        memcpy(to.scales, from, 2);
        memcpy(to.offsets, from + 2, 2);
        nibbles<2>(from + 4, to.q);
    }
};
struct Q5_0 {
    static constexpr int NUM_BYTES = 22, SIZE = 32, BITS = 5, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        memcpy(to.scales, from, 2);
        nibbles<2>(from + 6, to.q);
        fifth_bits(from + 2, to.q);
    }
};
struct Q5_1 {
    static constexpr int NUM_BYTES = 24, SIZE = 32, BITS = 5, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        memcpy(to.scales, from, 2);
        memcpy(to.offsets, from + 2, 2);
        nibbles<2>(from + 8, to.q);
        fifth_bits(from + 4, to.q);
    }
};
struct Q8_0 {
    static constexpr int NUM_BYTES = 34, SIZE = 32, BITS = 8, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        memcpy(to.scales, from, 2);
        for (int i = 0; i < 4; i++) to.q[i] = eight(from + 2 + 8 * i) ^ 128 * BYTES;  // signed there
    }
};
struct Q2_K {
    static constexpr int NUM_BYTES = 84, SIZE = 256, BITS = 4, GROUP = 16;
    static void unpack(const uint8_t* from, Block& to) {
        for (int i = 0; i < 16; i++) to.scales[i] = from[i] & 15, to.offsets[i] = from[i] >> 4;
        memcpy(&to.scale, from + 80, 2);
        memcpy(&to.offset, from + 82, 2);
        to.offset ^= 0x8000;  // the minima are subtracted
        for (int half = 0; half < 2; half++) pairs<4>(from + 16 + 32 * half, to.q + 16 * half);
    }
};
struct Q3_K {
    static constexpr int NUM_BYTES = 110, SIZE = 256, BITS = 4, GROUP = 16;
    static void unpack(const uint8_t* from, Block& to) {
        const uint8_t *low = from + 96, *high = from + 104;
        for (int i = 0; i < 16; i++)
            to.scales[i] = uint8_t((low[i % 8] >> i / 8 * 4 & 15 | (high[i % 4] >> i / 4 * 2 & 3) << 4) - 32);
        memcpy(&to.scale, from + 108, 2);
        for (int half = 0; half < 2; half++) pairs<4>(from + 32 + 32 * half, to.q + 16 * half);
        for (int i = 0; i < 4; i++)
            for (int g = 0; g < 8; g++) {  // bit g of a byte: of 32 numbers; 4 of three bits are 8 of four
                uint64_t& q = to.q[4 * g + i];
                q = (q | (eight(from + 8 * i) >> g & BYTES) << 2) + 4 * BYTES;
            }
    }
};
struct Q4_K {
    static constexpr int NUM_BYTES = 144, SIZE = 256, BITS = 4, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        codes_k(from, to);
        for (int j = 0; j < 4; j++) nibbles<4>(from + 16 + 32 * j, to.q + 8 * j);
    }
};
struct Q5_K {
    static constexpr int NUM_BYTES = 176, SIZE = 256, BITS = 5, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        codes_k(from, to);
        for (int j = 0; j < 4; j++) nibbles<4>(from + 48 + 32 * j, to.q + 8 * j);
        for (int i = 0; i < 4; i++) {
            uint64_t high = eight(from + 16 + 8 * i);  // bit g of a byte: of group g
            for (int g = 0; g < 8; g++) to.q[4 * g + i] |= (high >> g & BYTES) << 4;
        }
    }
};
struct Q6_K {
    static constexpr int NUM_BYTES = 210, SIZE = 256, BITS = 6, GROUP = 16;
    static void unpack(const uint8_t* from, Block& to) {
        memcpy(to.scales, from + 192, 16);
        memcpy(&to.scale, from + 208, 2);
        for (int half = 0; half < 2; half++) {
            uint64_t* q = to.q + 16 * half;
            nibbles<8>(from + 64 * half, q);
            for (int i = 0; i < 4; i++) {
                uint64_t high = eight(from + 128 + 32 * half + 8 * i);
                for (int f = 0; f < 4; f++) q[4 * f + i] |= (high >> 2 * f & 3 * BYTES) << 4;
            }
        }
    }
};
struct IQ4_XS {
    static constexpr int NUM_BYTES = 136, SIZE = 256, BITS = 4, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        const uint8_t *high = from + 2, *low = from + 4;
        for (int i = 0; i < 8; i++)
            to.scales[i] = uint8_t((low[i / 2] >> i % 2 * 4 & 15 | (high[i / 4] >> i % 4 * 2 & 3) << 4) - 32);
        memcpy(&to.scale, from, 2);
        for (int g = 0; g < 8; g++) nibbles<2>(from + 8 + 16 * g, to.q + 4 * g);
    }
};
struct MXFP4 {
    static constexpr int NUM_BYTES = 17, SIZE = 32, BITS = 4, GROUP = 32;
    static void unpack(const uint8_t* from, Block& to) {
        uint16_t power = from[0] < 2 ? 0x20 << from[0] : (from[0] - 1) << 7;  // half of it, in bfloat16
        memcpy(to.scales, &power, 2);
        nibbles<2>(from + 1, to.q);
    }
};

template <class Kind>
void pack(const Linear& linear, const uint8_t* blocks, int threads) {
    constexpr int GROUPS = Kind::SIZE / Kind::GROUP, STEPS = Kind::GROUP / 4;
    const Format& f = linear.format;
    Layout layout(f, linear.k);
    long per_row = linear.k / Kind::SIZE;
    parallel_for(threads, (linear.n + PANEL - 1) / PANEL, 1, [&](long index, int) {
        char* panel = (char*)linear.weights + index * layout.panel_bytes();
        int lanes = int(std::min<long>(PANEL, linear.n - index * PANEL));
        const uint8_t* rows = blocks + index * PANEL * per_row * Kind::NUM_BYTES;
        Block block;
        for (long b = 0; b < per_row; b++) {
            char *header = panel + layout.header_of(b * GROUPS), *units = panel + layout.offset_of(b * GROUPS);
            for (int lane = 0; lane < lanes; lane++) {
                const uint8_t* from = rows + (lane * per_row + b) * Kind::NUM_BYTES;
                __builtin_prefetch(from + AHEAD);
                Kind::unpack(from, block);
                put_header(f, &block.scale, &block.offset, lane, header);
                const uint8_t* q = (const uint8_t*)block.q;
                for (int g = 0; g < GROUPS; g++, q += Kind::GROUP) {
                    char* unit = units + g * layout.unit_bytes;
                    put_number(f.scales, block.scales, g, lane, unit);
                    put_number(f.offsets, block.offsets, g, lane, unit + layout.offsets);
                    put_bits<Kind::BITS>(q, STEPS, lane, (uint32_t*)(unit + layout.quants));
                }
            }
        }
    });
}
}  // namespace

// Fills linear->weights, which are zeros, from rows of whole blocks of GGML's type number `kind`, whose format the
// linear has. Returns -1 for a kind it does not know.
EXPORT int blade_pack_blocks(const Linear* linear, const uint8_t* blocks, int kind, int threads) {
    switch (kind) {
        case 2: return pack<Q4_0>(*linear, blocks, threads), OK;
        case 3: return pack<Q4_1>(*linear, blocks, threads), OK;
        case 6: return pack<Q5_0>(*linear, blocks, threads), OK;
        case 7: return pack<Q5_1>(*linear, blocks, threads), OK;
        case 8: return pack<Q8_0>(*linear, blocks, threads), OK;
        case 10: return pack<Q2_K>(*linear, blocks, threads), OK;
        case 11: return pack<Q3_K>(*linear, blocks, threads), OK;
        case 12: return pack<Q4_K>(*linear, blocks, threads), OK;
        case 13: return pack<Q5_K>(*linear, blocks, threads), OK;
        case 14: return pack<Q6_K>(*linear, blocks, threads), OK;
        case 20: return pack<Q4_0>(*linear, blocks, threads), OK;  // but for their values, as IQ4_NL's are
        case 23: return pack<IQ4_XS>(*linear, blocks, threads), OK;
        case 39: return pack<MXFP4>(*linear, blocks, threads), OK;
    }
    return -1;
}
