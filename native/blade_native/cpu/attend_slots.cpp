// Attention of queries that see some keys of the cache alone: these are laid side by side, as a cache of their own in which
// each query has a sequence, over which attention goes as ever. So a query that sees all keys before it gets what it gets of
// attention to all, to the last bit.
#include <algorithm>
#include <numeric>

#include "attention_paths.h"
#include "parallel.h"

EXPORT int blade_attend(const AttendCall*);

namespace {
using namespace attention;

constexpr long COPIED_BYTES = 16L << 20;  // of keys and values that are laid out at a time
constexpr long RUN = 8 * CHUNK;           // keys that a thread lays out at a time

// Tokens [lane, lane + num) of a chunk, which follow each other in the other one too.
void copy_keys(const Kept& kept, long d, const char* from, long lane, char* to, long to_lane, long num) {
    const long num_words = d * element_bits(kept) / 32;
    const uint32_t* source = (const uint32_t*)from + lane;
    uint32_t* target = (uint32_t*)to + to_lane;
    long done = 0;
    for (; done + 4 <= num; done += 4)
        for (long i = 0; i < num_words; i++) memcpy(target + i * CHUNK + done, source + i * CHUNK + done, 16);
    for (; done < num; done++)
        for (long i = 0; i < num_words; i++) target[i * CHUNK + done] = source[i * CHUNK + done];
    for (long i = 0; i < num; i++) copy_numbers(kept, d, from, int(lane + i), to, int(to_lane + i));
}

void copy_values(const Kept& kept, long d, const char* from, long lane, char* to, long to_lane, long num) {
    const long per_word = 32 / element_bits(kept);
    if (lane % per_word || to_lane % per_word || num % per_word) {
        for (long i = 0; i < num; i++) copy_value(kept, d, from, int(lane + i), to, int(to_lane + i));
        return;
    }
    const long words = num / per_word * d;
    memcpy((uint32_t*)to + to_lane / per_word * d, (const uint32_t*)from + lane / per_word * d, words * 4);
    for (long i = 0; i < num; i++) copy_numbers(kept, d, from, int(lane + i), to, int(to_lane + i));
}

// Keys [from, to) of a query, at its slots, to the blocks from `first_block` on.
void lay_out(const PagedKV& kv, const int32_t* slots, long from, long to, const PagedKV& laid, long first_block, long head) {
    const long d = kv.head_dim, key_bytes = chunk_bytes(kv.keys, d), value_bytes = chunk_bytes(kv.values, d);
    for (long key = from, num; key < to; key += num) {
        const long slot = slots[key], lane = slot % CHUNK, to_lane = key % CHUNK;
        const long room = std::min({CHUNK - lane, CHUNK - to_lane, to - key});
        for (num = 1; num < room && slots[key + num] == slot + num;) num++;
        const long block = first_block + key / kv.block_size, offset = key % kv.block_size;
        const auto chunk = [&](const PagedKV& of, char* cache, long bytes, long block, long offset) {
            return chunk_at(of, cache, bytes, block, head, offset);
        };
        copy_keys(kv.keys, d, chunk(kv, kv.k, key_bytes, slot / kv.block_size, slot % kv.block_size), lane,
                  chunk(laid, laid.k, key_bytes, block, offset), to_lane, num);
        copy_values(kv.values, d, chunk(kv, kv.v, value_bytes, slot / kv.block_size, slot % kv.block_size), lane,
                    chunk(laid, laid.v, value_bytes, block, offset), to_lane, num);
    }
}

int attend_slots(const AttendSlotsCall& c) {
    const PagedKV& kv = *c.kv;
    const long itemsize = kv.dtype == FLOAT32 ? 4 : 2, row = kv.num_heads * kv.head_dim;
    if (c.num_tokens == 0) return OK;
    Scratch sequences((2 * c.num_tokens + 1) * sizeof(int32_t));
    int32_t *lens = (int32_t*)sequences.data, *starts = lens + c.num_tokens;
    if (!lens) return OUT_OF_MEMORY;
    for (long t = 0; t < c.num_tokens; t++) {
        const int32_t* slots = c.slots + t * c.width;
        lens[t] = int32_t(std::find(slots, slots + c.width, -1) - slots);
    }
    std::iota(starts, starts + c.num_tokens + 1, 0);
    const long longest = *std::max_element(lens, lens + c.num_tokens);
    const long per_token = (longest + kv.block_size - 1) / kv.block_size, chunks = per_token * kv.num_kv_heads * kv.block_size / CHUNK;
    const long key_bytes = chunks * chunk_bytes(kv.keys, kv.head_dim), value_bytes = chunks * chunk_bytes(kv.values, kv.head_dim);
    const long most = std::max(1L, std::min<long>(c.num_tokens, COPIED_BYTES / (key_bytes + value_bytes)));
    Scratch keys(most * key_bytes), values(most * value_bytes), tables(most * per_token * sizeof(int32_t));
    if (!keys.data || !values.data || !tables.data) return OUT_OF_MEMORY;
    PagedKV laid = kv;
    laid.k = (char*)keys.data, laid.v = (char*)values.data;
    int32_t* blocks = (int32_t*)tables.data;
    std::iota(blocks, blocks + most * per_token, 0);
    for (long first = 0; first < c.num_tokens; first += most) {
        const long num = std::min(most, c.num_tokens - first), runs = (longest + RUN - 1) / RUN;
        parallel_for(c.threads, num * kv.num_kv_heads * runs, 1, [&](long i, int) {
            const long t = i / runs / kv.num_kv_heads, head = i / runs % kv.num_kv_heads, from = i % runs * RUN;
            const long to = std::min<long>(from + RUN, lens[first + t]);
            lay_out(kv, c.slots + (first + t) * c.width, from, to, laid, t * per_token, head);
        });
        const Step step{nullptr, nullptr, starts, lens + first, blocks, nullptr, num, num, per_token};
        const AttendCall call{&laid, &step, (const char*)c.q + first * c.q_stride * itemsize, c.q_stride, c.scale, 0,
                              (char*)c.out + first * row * itemsize, 0, c.threads};
        if (const int status = blade_attend(&call)) return status;
    }
    return OK;
}
}  // namespace

EXPORT int blade_attend_slots(const AttendSlotsCall* call) { return attend_slots(*call); }
