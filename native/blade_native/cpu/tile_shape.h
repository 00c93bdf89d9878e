// What the inner loops of a level look like: how many rows of activations a tile takes, as many as keep all sums in
// registers, and whether bf16 has to be widened.
#pragma once

// Tiles of more rows than the WIDE ones take a panel half by half: where the registers hold no more, and in streams where
// the memory gives more so (measured; some formats' halves lie in lines of their own, 8-bit ones' do not gain by it).
#if defined(__AVX512F__)
constexpr int MAX_TILE_ROWS = 12;  // 24 accumulators of a panel, 2 weights and an activation fit 32 registers
constexpr int TALL_TILE_ROWS = 12;
constexpr int WIDE_TILE_ROWS = 12;
constexpr int STREAM_ROWS = 16;  // of a single tile: while a second one works nothing would be fetched from memory
constexpr int wide_stream_rows(int bits) { return bits == 8 || bits == 6 || bits == 5 ? 8 : 0; }
#elif defined(__AVX2__)
constexpr int MAX_TILE_ROWS = 4;
constexpr int TALL_TILE_ROWS = 6;  // of floats: twelve sums, two weights and an activation fit as well
constexpr int WIDE_TILE_ROWS = 2;
constexpr int STREAM_ROWS = 4;
constexpr int wide_stream_rows(int) { return 2; }
#else
constexpr int MAX_TILE_ROWS = 2;
constexpr int TALL_TILE_ROWS = 2;
constexpr int WIDE_TILE_ROWS = 1;
constexpr int STREAM_ROWS = 2;
constexpr int wide_stream_rows(int) { return 1; }
#endif
constexpr long TILE_AHEAD = 512;  // bytes of activations, which come from L2, between what a tile multiplies and what it prefetches
#ifdef __AVX512F__
constexpr long STREAM_AHEAD = 2048;  // bytes between what is read and what is prefetched
#else
constexpr long STREAM_AHEAD = 1024;
#endif
constexpr int LATE_ROWS = 4;  // up to here it is less work to scale sums of nested numbers than to make bytes of these
// How many times 16 channels of a panel a tile of R rows takes at a time.
template <int R>
constexpr int TILE_VECTORS = R > WIDE_TILE_ROWS ? 1 : 2;
template <int R, int BITS>
constexpr int STREAM_VECTORS = R > wide_stream_rows(BITS) ? 1 : 2;

#ifdef __AVX512VNNI__
constexpr bool NESTS = true;  // an instruction multiplies bytes as fast as it would smaller integers: nested ones become bytes
#else
constexpr bool NESTS = false;
#endif
#ifdef __AMX_TILE__
constexpr bool AMX = true;  // tile instructions multiply integers of 8 bits, and bf16 (amx_tile.h)
#else
constexpr bool AMX = false;
#endif
constexpr int AMX_ROWS = 32;   // of a tile of activations: two registers of sixteen
constexpr int AMX_WORDS = 16;  // of K, that a register holds
#if defined(__AVX512BF16__) || defined(__AMX_TILE__)
constexpr bool WIDENS_BF16 = false;
#else
constexpr bool WIDENS_BF16 = true;  // no instruction multiplies bf16: both operands become floats
#endif
