// ldmatrix and mma.sync m16n8k16 with the fragment layouts of the PTX manual (sections on warp-level matrix
// instructions). Products are exact and summed in float in the order of k: hardware rounds a little differently.
#pragma once
#include "emulator/async_copy.h"
#include "emulator/warp.h"

namespace emulator {

static inline void require_full_warp(const char* operation, Site site) {
  if (block.warps[current->warp].alive != 0xffffffffu)
    fail("%s at %s:%d: some lanes of the warp are gone", operation, site.file, site.line);
}

struct MatrixLoad {
  const void* row;
  uint32_t* registers;
  int num_tiles;
  bool transposed;
};

// Element [row, column] of a tile of 8x8, of which lane 8 * tile + row has the row's address.
EMULATOR_CORE static uint32_t tile_element(void** operands, int tile, int row, int column) {
  const auto* owner = static_cast<const MatrixLoad*>(operands[tile * 8 + row]);
  uint16_t value;
  move_bytes(&value, static_cast<const char*>(owner->row) + column * 2, 2);
  return value;
}

EMULATOR_CORE static void combine_ldmatrix(void** operands, unsigned) {
  uint32_t received[WARP][4];
  for (int lane = 0; lane < WARP; ++lane) {
    const auto* mine = static_cast<const MatrixLoad*>(operands[lane]);
    const int i = lane / 4, j = lane % 4 * 2;
    for (int tile = 0; tile < mine->num_tiles; ++tile)
      received[lane][tile] =
          mine->transposed ? tile_element(operands, tile, j, i) | tile_element(operands, tile, j + 1, i) << 16
                           : tile_element(operands, tile, i, j) | tile_element(operands, tile, i, j + 1) << 16;
  }
  for (int lane = 0; lane < WARP; ++lane) {
    const auto* mine = static_cast<const MatrixLoad*>(operands[lane]);
    move_bytes(mine->registers, received[lane], mine->num_tiles * sizeof(uint32_t));
  }
}

static inline void ldmatrix(uint32_t* registers, const void* row, int num_tiles, bool transposed, Site site) {
  require_aligned(row, 16, "ldmatrix", site);
  require_full_warp("ldmatrix", site);
  for (int i = 0; i < 4; ++i) (void)static_cast<const volatile uint32_t*>(row)[i];  // the sanitizers see the lane's read
  MatrixLoad operand{row, registers, num_tiles, transposed};
  collective("ldmatrix", 0xffffffffu, &operand, combine_ldmatrix, site);
}

struct MatrixMultiply {
  float* c;
  const uint32_t *a, *b;
};

template <class T>
static float element_of(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  T value;
  memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

template <class T>
EMULATOR_CORE static void combine_mma(void** operands, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const auto* mine = static_cast<const MatrixMultiply*>(operands[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) a[g + (i / 2 & 1) * 8][t + (i & 1) + i / 4 * 8] = element_of<T>(mine->a[i / 2], i & 1);
    for (int i = 0; i < 4; ++i) b[t + (i & 1) + i / 2 * 8][g] = element_of<T>(mine->b[i / 2], i & 1);
  }
  for (int lane = 0; lane < WARP; ++lane) {
    const auto* mine = static_cast<const MatrixMultiply*>(operands[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    float c[4];
    move_bytes(c, mine->c, sizeof c);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) c[i] += a[g + i / 2 * 8][k] * b[k][t + (i & 1)];
    move_bytes(mine->c, c, sizeof c);
  }
}

template <class T>
static void mma16816(float* c, const uint32_t* a, const uint32_t* b, Site site) {
  require_full_warp("mma.sync", site);
  MatrixMultiply operand{c, a, b};
  collective("mma.sync", 0xffffffffu, &operand, combine_mma<T>, site);
}

}  // namespace emulator
