// Tile registers for machines without them, to test amx_tile.h: included before a source, it answers for the instructions of
// amx.h as Intel's manual (SDM, volume 2) says what they do, the order of sums and the flushing of subnormals included. What
// would be an exception there is kept for who asks for it (blade_amx_fault), and nothing is done.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __AMX_TILE__ 1
#define BLADE_EMULATED_AMX

namespace emulated {
inline std::atomic<const char*> fault{nullptr};  // the first one
inline std::atomic<int> threads_in_use{0};       // that have shapes, and so state to be saved

inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float flush_subnormal(float x) {  // to a zero of its sign
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7f800000 ? x : from_bits(bits & 0x80000000);
}

struct Registers {
    static constexpr int NUM = 8, ROWS = 16, BYTES = 64;
    bool ready = false;
    int rows[NUM], row_bytes[NUM];
    uint8_t data[NUM][ROWS][BYTES];

    void load_shapes(const void* shapes) {
        const uint8_t* at = (const uint8_t*)shapes;
        if (at[0] == 0) return release();
        bool sound = at[0] == 1 && at[1] == 0;  // a start_row is for what was interrupted
        for (int i = 2; i < 16; i++) sound &= at[i] == 0;
        for (int t = 0; t < 16; t++) {
            uint16_t bytes;
            memcpy(&bytes, at + 16 + 2 * t, 2);
            const int num = at[48 + t];
            sound &= t < NUM ? bytes <= BYTES && num <= ROWS && (bytes == 0) == (num == 0) : bytes == 0 && num == 0;
            if (t < NUM) rows[t] = num, row_bytes[t] = bytes;
        }
        use(sound);
        if (!sound) fail("#GP: ldtilecfg of shapes that there are not");
        memset(data, 0, sizeof data);
    }
    void release() { use(false); }

    void zero(int t) {
        if (is_shaped(t)) memset(data[t], 0, sizeof data[t]);
    }
    void load(int t, const void* from, long stride) {
        if (!is_shaped(t)) return;
        memset(data[t], 0, sizeof data[t]);
        for (int r = 0; r < rows[t]; r++) memcpy(data[t][r], (const char*)from + r * stride, row_bytes[t]);
    }
    void store(int t, void* to, long stride) {
        if (!is_shaped(t)) return;
        for (int r = 0; r < rows[t]; r++) memcpy((char*)to + r * stride, data[t][r], row_bytes[t]);
    }

    // TDPBSUD: signed bytes of a, unsigned ones of b.
    __attribute__((optimize("O2"))) void dot_bytes(int c, int a, int b) {
        if (!are_shaped(c, a, b)) return;
        for (int m = 0; m < rows[c]; m++)
            for (int k = 0; k < row_bytes[a] / 4; k++)
                for (int n = 0; n < row_bytes[c] / 4; n++) {
                    uint32_t sum;
                    memcpy(&sum, data[c][m] + 4 * n, 4);
                    for (int i = 0; i < 4; i++) sum += uint32_t(int8_t(data[a][m][4 * k + i]) * data[b][k][4 * n + i]);
                    memcpy(data[c][m] + 4 * n, &sum, 4);
                }
    }

    // TDPBF16PS: the even products of a row and a column are summed, the odd ones, then both, and that is added.
    __attribute__((optimize("O2"))) void dot_bf16(int c, int a, int b) {
        if (!are_shaped(c, a, b)) return;
        auto factor = [&](int t, int row, int i) {
            uint16_t bits;
            memcpy(&bits, data[t][row] + 2 * i, 2);
            return flush_subnormal(from_bits(uint32_t(bits) << 16));
        };
        for (int m = 0; m < rows[c]; m++) {
            float sums[BYTES / 2] = {};
            for (int k = 0; k < row_bytes[a] / 4; k++)
                for (int n = 0; n < row_bytes[c] / 4; n++)
                    for (int i = 0; i < 2; i++) {
                        float& sum = sums[2 * n + i];
                        sum = flush_subnormal(std::fma(factor(a, m, 2 * k + i), factor(b, k, 2 * n + i), sum));
                    }
            for (int n = 0; n < row_bytes[c] / 4; n++) {
                float before;
                memcpy(&before, data[c][m] + 4 * n, 4);
                const float products = flush_subnormal(sums[2 * n] + sums[2 * n + 1]);
                const float sum = flush_subnormal(flush_subnormal(before) + products);
                memcpy(data[c][m] + 4 * n, &sum, 4);
            }
        }
    }

private:
    void use(bool now) {
        threads_in_use += now - ready;
        ready = now;
    }
    static bool fail(const char* what) {
        const char* none = nullptr;
        fault.compare_exchange_strong(none, what);
        return false;
    }
    bool is_shaped(int t) const {
        if (!ready) return fail("#UD: a tile instruction without shapes");
        return rows[t] > 0 || fail("#UD: a register without a shape");
    }
    bool are_shaped(int c, int a, int b) const {
        if (!is_shaped(c) || !is_shaped(a) || !is_shaped(b)) return false;
        if (a == b || b == c || c == a) return fail("#UD: a register is two operands");
        if (row_bytes[c] % 4 || row_bytes[a] % 4 || row_bytes[b] % 4) return fail("#UD: part of a word");
        if (rows[c] != rows[a]) return fail("#UD: sums and activations have other numbers of rows");
        if (row_bytes[c] != row_bytes[b]) return fail("#UD: sums and weights have other numbers of channels");
        return row_bytes[a] / 4 == rows[b] || fail("#UD: activations and weights have other numbers of words");
    }
};

inline thread_local Registers registers;
}  // namespace emulated

// What went wrong first, or null; and how many threads have not released their registers.
extern "C" inline __attribute__((visibility("default"), used)) const char* blade_amx_fault() { return emulated::fault; }
extern "C" inline __attribute__((visibility("default"), used)) int blade_amx_in_use() { return emulated::threads_in_use; }
