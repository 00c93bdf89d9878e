// Weights [n, k] as checkpoints have them become panels (linear_format.h), once, when a model is loaded; and rows of a
// packed matrix are read back, which lets a tied embedding share its head's memory.
#include <algorithm>
#include <cmath>

#include "panel.h"
#include "parallel.h"

namespace {
// [n][words] -> [n / 32][words][32]; channels from n on are zeros.
void pack_dense(const char* weight, int64_t n, long words, uint32_t* out, int threads) {
    parallel_for(threads, (n + PANEL - 1) / PANEL, 1, [=](long panel, int) {
        for (long u = 0; u < words; u++)
            for (long lane = 0; lane < PANEL; lane++) {
                long channel = panel * PANEL + lane;
                uint32_t* word = out + (panel * words + u) * PANEL + lane;
                *word = 0;
                if (channel < n) memcpy(word, weight + (channel * words + u) * 4, 4);
            }
    });
}

// The numbers of unit i of all.
void put_nested(const Layout& layout, const Grouped& from, long i, int lane, char* unit) {
    put_number(HALF, from.block_scales, i, lane, unit);
    for (int g = 0; g < layout.groups; g++) {
        long group = i * layout.groups + g;
        int code = ((const uint8_t*)from.scales)[group] - 1, minimum = ((const uint8_t*)from.offsets)[group];
        unit[(2 + g / 2) * PANEL + lane] |= char(code << g % 2 * 4);
        unit[layout.offsets + g * PANEL + lane] = char(layout.zero - minimum);
    }
}

void put_unit(const Layout& layout, const Grouped& from, long channel, long u, char* panel) {
    const Format& f = layout.format;
    int lane = int(channel % PANEL);
    long i = channel * layout.units + u;
    char* unit = panel + layout.offset_of(u);
    if (f.coding == NESTED) {
        put_nested(layout, from, i, lane, unit);
    } else {
        put_number(f.scales, from.scales, i, lane, unit);
        put_number(f.offsets, from.offsets, i, lane, unit + layout.offsets);
    }
    with_bits(f.bits, [&](auto bits) {
        put_bits<bits>(from.q + i * layout.columns, layout.steps, lane, (uint32_t*)(unit + layout.quants));
    });
    if (!layout.block_header || u % layout.block) return;
    long block = channel * (layout.units / layout.block) + u / layout.block;
    put_header(f, from.block_scales + block, from.block_offsets + block, lane, panel + layout.header_of(u));
}

INLINE int pair_of(int lane) { return lane / vec::LANES * vec::LANES + vec::float8_place(lane % vec::LANES); }

// One unit of one channel, of which `columns` are there. Where one is NaN so is the scale, and with it every sum.
void put_float8(const Layout& layout, const uint8_t* q, long columns, float scale, int lane, char* unit) {
    bool has_nan = false;
    char* pairs = unit + layout.quants + 2 * pair_of(lane);
    for (long i = 0; i < columns; i++) {
        has_nan |= (q[i] & 0x7f) == 0x7f;
        pairs[2 * PANEL * (i / 2) + i % 2] = char(q[i]);
    }
    ((float*)unit)[lane] = has_nan ? NAN : scale * vec::FLOAT8_SCALE;
}

template <class E>
void copy_dense(const Layout& layout, const char* panel, int lane, E* out) {
    for (long u = 0; u < layout.units; u++)
        memcpy((char*)out + 4 * u, panel + layout.offset_of(u) + 4 * lane, 4);
}

// One channel of a panel, dequantised: one rounding in float32 (products fit it, but for codes with 6 and 8 bits).
template <class E>
void dequantize(const Layout& layout, const char* panel, int lane, const int32_t* order, E* out) {
    const Format& f = layout.format;
    BlockUnits block;
    for (long u = 0; u < layout.units; u++) {
        uint32_t words[PANEL * MAX_GROUP / 4];
        float scales[PANEL], offsets[PANEL] = {};
        const char* unit = panel + layout.offset_of(u);
        if (u % layout.block == 0) block.set(f, panel + layout.header_of(u));
        unpack_scales(layout, unit, block, scales, offsets);
        const uint32_t* q = unpack_unit(layout, unit, words);
        for (int i = 0; i < layout.columns; i++) {
            float number = ((const uint8_t*)(q + i / 4 * PANEL + lane))[i % 4];
            long column = u * layout.columns + i;
            vec::from_float((number - layout.zero) * scales[lane] + offsets[lane], out[order ? order[column] : column]);
        }
    }
}

template <class E>
void dequantize_float8(const Layout& layout, const char* panel, int lane, long k, E* out) {
    for (long i = 0; i < k; i++) {
        const char* unit = panel + layout.offset_of(i / layout.columns);
        const char* pair = unit + layout.quants + 2 * (i % layout.columns / 2 * PANEL + pair_of(lane));
        float scale = ((const float*)unit)[lane] / vec::FLOAT8_SCALE;
        vec::from_float(vec::float8_to_float(uint8_t(pair[i % 2])) * scale, out[i]);
    }
}

template <class E>
void unpack_rows(const UnpackRowsCall& c) {
    const Linear& linear = *c.linear;
    Layout layout(linear.format, linear.k);
    parallel_for(c.threads, c.num_rows, 8, [&](long i, int) {
        const char* panel = linear.weights + c.rows[i] / PANEL * layout.panel_bytes();
        E* out = (E*)c.out + i * linear.k;
        if (linear.format.bits >= 16)
            copy_dense(layout, panel, int(c.rows[i] % PANEL), out);
        else if (linear.format.coding == FLOATS)
            dequantize_float8(layout, panel, int(c.rows[i] % PANEL), linear.k, out);
        else
            dequantize(layout, panel, int(c.rows[i] % PANEL), linear.order, out);
    });
}
}  // namespace

// Bytes of the packed weights.
EXPORT int64_t blade_packed_bytes(const Linear* linear) {
    return (linear->n + PANEL - 1) / PANEL * Layout(linear->format, linear->k).panel_bytes();
}

// Fills linear->weights from weight [n, k], contiguous, in the dtype of the dense format.
EXPORT int blade_pack_dense(const Linear* linear, const void* weight, int threads) {
    pack_dense((const char*)weight, linear->n, linear->k * linear->format.bits / 32, (uint32_t*)linear->weights,
               threads);
    return OK;
}

// Fills linear->weights, which are zeros, from grouped weights.
EXPORT int blade_pack_grouped(const Linear* linear, const Grouped* from, int threads) {
    Layout layout(linear->format, linear->k);
    parallel_for(threads, (linear->n + PANEL - 1) / PANEL, 1, [&](long panel, int) {
        char* to = (char*)linear->weights + panel * layout.panel_bytes();
        long last = std::min<long>(linear->n, (panel + 1) * PANEL);
        for (long u = 0; u < layout.units; u++)
            for (long channel = panel * PANEL; channel < last; channel++) put_unit(layout, *from, channel, u, to);
    });
    return OK;
}

// Fills linear->weights, which are zeros, from 8-bit floats. No group of the format straddles two blocks.
EXPORT int blade_pack_float8(const Linear* linear, const Float8* from, int threads) {
    Layout layout(linear->format, linear->k);
    long per_row = (linear->k + from->block_k - 1) / from->block_k;
    parallel_for(threads, (linear->n + PANEL - 1) / PANEL, 1, [&](long panel, int) {
        char* to = (char*)linear->weights + panel * layout.panel_bytes();
        long last = std::min<long>(linear->n, (panel + 1) * PANEL);
        for (long u = 0; u < layout.units; u++)
            for (long channel = panel * PANEL; channel < last; channel++) {
                long column = u * layout.columns;
                float scale = from->scales[channel / from->block_n * per_row + column / from->block_k];
                put_float8(layout, from->q + channel * linear->k + column,
                           std::min<long>(layout.columns, linear->k - column), scale, int(channel % PANEL),
                           to + layout.offset_of(u));
            }
    });
    return OK;
}

EXPORT int blade_unpack_rows(const UnpackRowsCall* call) {
    return with_dtype(call->dtype, [&](auto e) { unpack_rows<decltype(e)>(*call); }), OK;
}

// Makes memory present, zeros where it is new, whatever others write to it meanwhile.
EXPORT int blade_touch(char* data, int64_t bytes) {
    constexpr int64_t PAGE = 4096;
    for (int64_t at = 0; at < bytes; at += PAGE) __atomic_fetch_or(data + at, 0, __ATOMIC_RELAXED);
    return OK;
}
