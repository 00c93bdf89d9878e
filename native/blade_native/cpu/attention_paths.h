// The ways up a tree of drafts. Tokens of a path that others lie between are put next to each other, as they would be
// without the others: then they are summed in the same order, and what follows them is the same to the last bit.
//
// Only chunks from the one on that holds the first token of the step have to be copied for it.
#pragma once
#include "attention_tile.h"

namespace attention {
// Whether a token at `place` in its sequence's step sees all tokens of it up to its own.
INLINE bool is_straight(uint64_t ancestors, int place) { return !ancestors || ancestors == ~uint64_t(0) >> (63 - place); }

INLINE int first_place(uint64_t ancestors) { return __builtin_ctzll(ancestors); }

INLINE int element_bits(const Kept& kept) {
    int bits = kept.storage == FLOAT32 ? 32 : 16;
    with_codes(kept.storage, [&](auto code) { bits = code.BITS; });
    return bits;
}

// Of element i of a word, the bits below it.
INLINE int element_shift(const Kept& kept, int i) {
    int bits = element_bits(kept), place = i;
    with_codes(kept.storage, [&](auto code) { place = int(code.place(i)); });
    return bits * place;
}

// A token's scales and middles.
INLINE void copy_numbers(const Kept& kept, long d, const char* from, int lane, char* to, int to_lane) {
    if (!coded(kept)) return;
    const long start = CHUNK * d * element_bits(kept) / 8, size = kept.storage == INT8 ? sizeof(float) : sizeof(bf16);
    const long num = d / kept.group * (kept.affine ? 2 : 1);
    for (long i = 0; i < num; i++)
        memcpy(to + start + (i * CHUNK + to_lane) * size, from + start + (i * CHUNK + lane) * size, size);
}

INLINE void copy_key(const Kept& kept, long d, const char* from, int lane, char* to, int to_lane) {
    const long num_words = d * element_bits(kept) / 32;
    for (long i = 0; i < num_words; i++) ((uint32_t*)to)[i * CHUNK + to_lane] = ((const uint32_t*)from)[i * CHUNK + lane];
    copy_numbers(kept, d, from, lane, to, to_lane);
}

INLINE void copy_value(const Kept& kept, long d, const char* from, int lane, char* to, int to_lane) {
    const int bits = element_bits(kept), per_word = 32 / bits;
    const int shift = element_shift(kept, lane % per_word), to_shift = element_shift(kept, to_lane % per_word);
    const uint32_t mask = ~uint32_t(0) >> (32 - bits);
    const uint32_t* source = (const uint32_t*)from + lane / per_word * d;
    uint32_t* target = (uint32_t*)to + to_lane / per_word * d;
    for (long i = 0; i < d; i++) {
        uint32_t element = source[i] >> shift & mask;
        target[i] = (target[i] & ~(mask << to_shift)) | element << to_shift;
    }
    copy_numbers(kept, d, from, lane, to, to_lane);
}

// What an item's keys and values lie in from `Item::copied_from` on.
INLINE long path_bytes(const Job& job, const Item& item) {
    const PagedKV& kv = *job.kv;
    const long num_chunks = (item.to - item.copied_from + CHUNK - 1) / CHUNK;
    return num_chunks * (chunk_bytes(kv.keys, kv.head_dim) + chunk_bytes(kv.values, kv.head_dim));
}

// Copies the keys, or values, of the item's path to `chunks`.
template <class Copy>
INLINE void copy_path(const Job& job, const Item& item, const Kept& kept, char* cache, char* chunks, Copy copy) {
    const PagedKV& kv = *job.kv;
    const int first = job.step->cu_seqlens[item.seq], num_tokens = job.step->cu_seqlens[item.seq + 1] - first;
    const int base = job.step->context_lens[item.seq] - num_tokens;
    const int32_t* blocks = job.step->block_tables + item.seq * job.step->max_blocks;
    const long bytes = chunk_bytes(kept, kv.head_dim);
    const auto chunk = [&](int key) {
        return chunk_at(kv, cache, bytes, blocks[key / kv.block_size], item.head, key % kv.block_size);
    };
    memcpy(chunks, chunk(base), bytes);  // what is before the step
    uint64_t left = ancestors_of(job, first + item.row / (kv.num_heads / kv.num_kv_heads));
    for (int key = base; left; key++, left &= left - 1) {
        const int from = base + first_place(left);
        char* target = chunks + (key - item.copied_from) / CHUNK * bytes;
        copy(kept, kv.head_dim, chunk(from), from % CHUNK, target, key % CHUNK);
    }
}

// At item.keys, where path_bytes are.
INLINE void lay_path(const Job& job, Item& item) {
    const PagedKV& kv = *job.kv;
    const long num_chunks = (item.to - item.copied_from + CHUNK - 1) / CHUNK;
    item.values = item.keys + num_chunks * chunk_bytes(kv.keys, kv.head_dim);
    copy_path(job, item, kv.keys, kv.k, item.keys, copy_key);
    copy_path(job, item, kv.values, kv.v, item.values, copy_value);
}
}  // namespace attention
