// Tile registers (Intel's manual, SDM volume 1, "Programming with Intel AMX"): eight of up to sixteen rows of 64 bytes, with
// shapes that a thread chooses. The compiler knows nothing of them: all is volatile, so that it stays in order, and what reads
// or writes memory says that it may be any, so that what is written before is there, the shapes too.
#pragma once
#include <cstdint>

#include "vec.h"

#ifdef __AMX_TILE__
namespace amx {
// What ldtilecfg loads.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

#ifdef BLADE_EMULATED_AMX
INLINE void load_shapes(const Shapes& shapes) { emulated::registers.load_shapes(&shapes); }
INLINE void release_registers() { emulated::registers.release(); }
template <int T>
INLINE void zero() {
    emulated::registers.zero(T);
}
template <int T>
INLINE void load(const void* from, long stride) {
    emulated::registers.load(T, from, stride);
}
template <int T>
INLINE void store(void* to, long stride) {
    emulated::registers.store(T, to, stride);
}
template <int C, int A, int B>
INLINE void dot_bytes() {
    emulated::registers.dot_bytes(C, A, B);
}
template <int C, int A, int B>
INLINE void dot_bf16() {
    emulated::registers.dot_bf16(C, A, B);
}
#else
INLINE void load_shapes(const Shapes& shapes) { asm volatile("ldtilecfg (%0)" : : "r"(&shapes) : "memory"); }
INLINE void release_registers() { asm volatile("tilerelease"); }
template <int T>
INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows lie `stride` bytes apart.
template <int T>
INLINE void load(const void* from, long stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
INLINE void store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(stride) : "memory");
}
// C [rows][16] += A [rows][words] of signed bytes, or of pairs of bf16, times B [words][16] of unsigned ones, or of pairs.
template <int C, int A, int B>
INLINE void dot_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
#endif
}  // namespace amx
#endif
