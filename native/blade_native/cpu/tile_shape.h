// What the inner loops of a level look like: how many rows of activations a tile takes, as many as keep all sums in
// registers, and whether bf16 has to be widened.
#pragma once

#if defined(__AVX512F__)
constexpr int MAX_TILE_ROWS = 12;  // 24 accumulators of a panel, 2 weights and an activation fit 32 registers
constexpr int TALL_TILE_ROWS = 12;
constexpr int NARROW_TILE_ROWS = 0;
#elif defined(__AVX2__)
constexpr int MAX_TILE_ROWS = 4;
constexpr int TALL_TILE_ROWS = 6;  // of floats: twelve sums, two weights and an activation fit as well
constexpr int NARROW_TILE_ROWS = 2;  // taller tiles take the panel half by half, for 16 registers hold no more
#else
constexpr int MAX_TILE_ROWS = 2;
constexpr int TALL_TILE_ROWS = 2;
constexpr int NARROW_TILE_ROWS = 1;
#endif
template <int R>
constexpr int TILE_VECTORS = NARROW_TILE_ROWS && R > NARROW_TILE_ROWS ? 1 : 2;  // of 16 channels at a time

#ifdef __AVX512BF16__
constexpr bool WIDENS_BF16 = false;
#else
constexpr bool WIDENS_BF16 = true;  // no instruction multiplies bf16: both operands become floats
#endif
