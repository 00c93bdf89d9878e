// Weights [n, k] as checkpoints have them become panels (linear_kinds.h), once, when a model is loaded; and rows of a
// packed dense matrix are read back, which lets a tied embedding share its head's memory.
#include <algorithm>
#include <cmath>

#include "linear_kinds.h"
#include "parallel.h"

namespace {
// [n, k] -> [n / 32][k / P][32][P]; channels from n on are zeros.
template <class E>
void pack_dense(const E* weight, int64_t n, int64_t k, uint32_t* out, int threads) {
    constexpr int P = Word<E>::ELEMENTS;
    long words = k / P, num_panels = (n + PANEL - 1) / PANEL;
    parallel_for(threads, num_panels, 1, [=](long panel, int) {
        for (long u = 0; u < words; u++)
            for (long lane = 0; lane < PANEL; lane++) {
                long channel = panel * PANEL + lane;
                uint32_t* word = out + (panel * words + u) * PANEL + lane;
                *word = 0;
                if (channel < n) memcpy(word, weight + channel * k + u * P, 4);
            }
    });
}

uint16_t to_half(float x) {  // IEEE binary16, round to nearest even; too large becomes infinite
    uint32_t u;
    memcpy(&u, &x, 4);
    uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude >= 0x47800000) return uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (magnitude < 0x38800000) return uint16_t(sign | uint32_t(lrintf(fabsf(x) * 0x1p24f)));
    return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// One group of one channel: q[UNIT] quants, scale and (4 bits) minimum, all at the channel's lane of the panel's unit.
template <int BITS>
void put_group(char* unit, int lane, const uint8_t* q, uint16_t scale, uint16_t least) {
    typedef Grouped<BITS> G;
    memcpy(unit + 2 * lane, &scale, 2);
    if (BITS == 4) memcpy(unit + 64 + 2 * lane, &least, 2);
    for (int i = 0; i < G::UNIT; i++) {
        int step = i / 4;
        char* byte = unit + G::HEADER + (BITS == 8 ? step : step / 2) * PANEL * 4 + lane * 4 + i % 4;
        if (BITS == 8 || step % 2 == 0)
            *byte = char(q[i]);
        else
            *byte = char(uint8_t(*byte) | q[i] << 4);
    }
}

template <int BITS, class Group>
void pack_grouped(int64_t n, int64_t k, char* out, int threads, Group group) {
    typedef Grouped<BITS> G;
    long units = k / G::UNIT, num_panels = (n + PANEL - 1) / PANEL;
    parallel_for(threads, num_panels, 1, [=](long panel, int) {
        for (long u = 0; u < units; u++)
            for (int lane = 0; lane < PANEL; lane++) {
                long channel = panel * PANEL + lane;
                uint8_t q[G::UNIT] = {};
                uint16_t scale = 0, least = 0;
                if (channel < n) group(channel, u, q, scale, least);
                put_group<BITS>(out + (panel * units + u) * G::PANEL_BYTES, lane, q, scale, least);
            }
    });
}

// Symmetric: w ~ scale * (q - 128), the largest magnitude becoming 127.
template <class E>
void quantize_int8(const E* w, uint8_t* q, uint16_t& scale) {
    float bound = 0;
    for (int i = 0; i < Grouped<8>::UNIT; i++) bound = std::max(bound, fabsf(vec::to_float(w[i])));
    scale = to_half(bound / 127);
    float step = vec::half_to_float(scale);
    float inverse = step > 0 ? 1 / step : 0;
    for (int i = 0; i < Grouped<8>::UNIT; i++)
        q[i] = uint8_t(128 + std::clamp(lrintf(vec::to_float(w[i]) * inverse), -127L, 127L));
}

// With a minimum: w ~ scale * q + least, q in 0..15.
template <class E>
void quantize_int4(const E* w, uint8_t* q, uint16_t& scale, uint16_t& least) {
    float low = vec::to_float(w[0]), high = low;
    for (int i = 1; i < Grouped<4>::UNIT; i++) {
        low = std::min(low, vec::to_float(w[i]));
        high = std::max(high, vec::to_float(w[i]));
    }
    scale = to_half((high - low) / 15);
    least = to_half(low);
    float step = vec::half_to_float(scale), zero = vec::half_to_float(least);
    float inverse = step > 0 ? 1 / step : 0;
    for (int i = 0; i < Grouped<4>::UNIT; i++)
        q[i] = uint8_t(std::clamp(lrintf((vec::to_float(w[i]) - zero) * inverse), 0L, 15L));
}

template <class E>
void pack(int kind, const E* weight, int64_t n, int64_t k, char* out, int threads) {
    if (kind == GROUPED_INT8)
        pack_grouped<8>(n, k, out, threads, [=](long channel, long u, uint8_t* q, uint16_t& scale, uint16_t&) {
            quantize_int8(weight + channel * k + u * Grouped<8>::UNIT, q, scale);
        });
    else if (kind == GROUPED_INT4)
        pack_grouped<4>(n, k, out, threads, [=](long channel, long u, uint8_t* q, uint16_t& scale, uint16_t& least) {
            quantize_int4(weight + channel * k + u * Grouped<4>::UNIT, q, scale, least);
        });
    else
        pack_dense(weight, n, k, (uint32_t*)out, threads);
}

template <class E>
void unpack_rows(const UnpackRowsCall& c) {
    constexpr int P = Word<E>::ELEMENTS;
    long k = c.linear->k, words = k / P;
    parallel_for(c.threads, c.num_rows, 8, [&](long i, int) {
        const uint32_t* panel = (const uint32_t*)c.linear->weights + c.rows[i] / PANEL * words * PANEL;
        E* out = (E*)c.out + i * k;
        for (long u = 0; u < words; u++) memcpy(out + u * P, panel + u * PANEL + c.rows[i] % PANEL, 4);
    });
}
}  // namespace

// Bytes of the packed weights.
EXPORT int64_t blade_packed_bytes(int kind, int64_t n, int64_t k) {
    int64_t num_panels = (n + PANEL - 1) / PANEL;
    switch (kind) {
        case DENSE_F32: return num_panels * k * Dense<float>::PANEL_BYTES;
        case DENSE_BF16: return num_panels * (k / 2) * Dense<bf16>::PANEL_BYTES;
        case GROUPED_INT8: return num_panels * (k / Grouped<8>::UNIT) * Grouped<8>::PANEL_BYTES;
        default: return num_panels * (k / Grouped<4>::UNIT) * Grouped<4>::PANEL_BYTES;
    }
}

// weight [n, k] contiguous, in the dtype of a dense kind or either dtype for a grouped one, quantised here.
EXPORT int blade_pack(int kind, const void* weight, int dtype, int64_t n, int64_t k, void* out, int threads) {
    if (dtype == FLOAT32)
        pack(kind, (const float*)weight, n, k, (char*)out, threads);
    else
        pack(kind, (const bf16*)weight, n, k, (char*)out, threads);
    return OK;
}

// Weights that are quantised already, repacked without loss. q [n, k] holds w = scale * (q - 128) for int8 and
// w = scale * q + least, q in 0..15, for int4; scales and minima [n, k / group] are halves.
EXPORT int blade_pack_quants(int kind, const uint8_t* q, const uint16_t* scales, const uint16_t* minima, int64_t n,
                             int64_t k, void* out, int threads) {
    auto copy = [=](int unit) {
        return [=](long channel, long u, uint8_t* to, uint16_t& scale, uint16_t& least) {
            memcpy(to, q + channel * k + u * unit, unit);
            scale = scales[channel * (k / unit) + u];
            if (minima) least = minima[channel * (k / unit) + u];
        };
    };
    if (kind == GROUPED_INT8)
        pack_grouped<8>(n, k, (char*)out, threads, copy(Grouped<8>::UNIT));
    else
        pack_grouped<4>(n, k, (char*)out, threads, copy(Grouped<4>::UNIT));
    return OK;
}

EXPORT int blade_unpack_rows(const UnpackRowsCall* call) {
    if (call->linear->kind == DENSE_F32)
        unpack_rows<float>(*call);
    else
        unpack_rows<bf16>(*call);
    return OK;
}
