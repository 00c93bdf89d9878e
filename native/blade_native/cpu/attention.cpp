// Causal attention of a ragged batch over the paged cache: decodes, prefill chunks and verifications in one call, with
// the partial softmaxes of FlashAttention (Dao et al. 2022), split over the context as in Flash-Decoding (Dao et al.
// 2023).
//
// The query rows of one sequence that share a KV head, (token, head of the group), are cut into tiles of at most
// MAX_TILE_ROWS. The context is cut into SPANs at fixed places, each yielding an unnormalised sum per row; spans are merged
// from left to right whether one thread does them all or several share them, so a row's result depends neither on the
// batch nor on the number of threads.
#include <algorithm>

#include "attention_keys.h"
#include "attention_paths.h"
#include "attention_values.h"
#include "parallel.h"

namespace {
using namespace attention;

constexpr long MERGED_FLOATS = 16 * 1024;  // of spans: less is not worth another thread

template <int R>
KeyKernels<R> key_kernels(const PagedKV& kv) {
    KeyKernels<R> kernels = {load_queries<bf16, R>, score<bf16, R>};
    if (kv.keys.storage == FLOAT32) kernels = {load_queries<float, R>, score<float, R>};
    with_codes(kv.keys.storage, [&](auto code) {
        kernels = {load_queries<decltype(code), R>, score<decltype(code), R>};
    });
    return kernels;
}

template <int R>
ValueKernel<R> value_kernel(const PagedKV& kv) {
    ValueKernel<R> kernel = kv.values.storage == FLOAT32 ? weigh<float, R> : weigh<bf16, R>;
    with_codes(kv.values.storage, [&](auto code) { kernel = weigh<decltype(code), R>; });
    return kernel;
}

template <int R>
__attribute__((noinline)) void attend_item(const Job& job, const Item& item) {
    Tile<R> tile(job, item, key_kernels<R>(*job.kv), value_kernel<R>(*job.kv));
    Sums<R> sums, span;
    sums.clear(job.kv->head_dim);
    for (int from = item.from; from < item.to; from = (from / SPAN + 1) * SPAN) {
        tile.sum_span(from, std::min((from / SPAN + 1) * SPAN, item.to), span);
        merge(span, tile.d, sums);
    }
    tile.write(sums);
}

// Whether two items are alike but for their KV heads, which are next to each other: so are their keys, block by block.
bool are_neighbours(const Item& a, const Item& b) {
    return a.seq == b.seq && a.head + 1 == b.head && a.row == b.row && a.num_rows == b.num_rows && a.from == b.from &&
           a.to == b.to;
}

// Two neighbours, span by span in turn: what the processor fetches beyond the one's keys is the other's.
template <int R>
__attribute__((noinline)) void attend_pair(const Job& job, const Item& item, const Item& neighbour) {
    Tile<R> tiles[] = {{job, item, key_kernels<R>(*job.kv), value_kernel<R>(*job.kv)},
                       {job, neighbour, key_kernels<R>(*job.kv), value_kernel<R>(*job.kv)}};
    tiles[0].next_tile = &tiles[1], tiles[1].next_tile = &tiles[0];
    tiles[0].next_span = false;
    Sums<R> sums[2], span;
    for (Sums<R>& each : sums) each.clear(job.kv->head_dim);
    for (int from = item.from; from < item.to; from = (from / SPAN + 1) * SPAN)
        for (int i = 0; i < 2; i++) {
            tiles[i].sum_span(from, std::min((from / SPAN + 1) * SPAN, item.to), span);
            merge(span, tiles[i].d, sums[i]);
        }
    for (int i = 0; i < 2; i++) tiles[i].write(sums[i]);
}

// One span of an item, its sums left at `out` for merge_parts: as much of Sums as head_dim needs.
template <int R>
__attribute__((noinline)) void attend_part(const Job& job, const Item& item, long part, float* out) {
    Tile<R> tile(job, item, key_kernels<R>(*job.kv), value_kernel<R>(*job.kv));
    int start = int(item.from / SPAN + part) * SPAN;
    tile.sum_span(std::max(start, item.from), std::min(start + SPAN, item.to), *(Sums<R>*)out);
}

template <int R>
__attribute__((noinline)) void merge_parts(const Job& job, const Item& item, long num_parts, const float* parts,
                                           long part_floats) {
    const Place place(job, item);
    Sums<R> sums;
    sums.clear(place.d);
    for (long part = 0; part < num_parts; part++) merge(*(const Sums<R>*)(parts + part * part_floats), place.d, sums);
    place.write(sums);
}

int count_parts(const Item& item) { return (item.to - 1) / SPAN - item.from / SPAN + 1; }

// Tokens of sequence `seq` that see all of the step before them: those of a tree that do not come after these.
int count_straight(const Job& job, int seq) {
    int first = job.step->cu_seqlens[seq], num_tokens = job.step->cu_seqlens[seq + 1] - first, num = 0;
    while (num < num_tokens && is_straight(ancestors_of(job, first + num), num)) num++;
    return num;
}

// Rows [row, end) of sequence `seq` in tiles for each KV head, by `cut(head, row, end)`. Returns how many.
template <class Cut>
long cut_rows(const Job& job, long row, long end, Cut cut) {
    const long num_rows = end - row, num_tiles = (num_rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (long i = 0; i < num_tiles * job.kv->num_kv_heads; i++) {
        const long tile = i / job.kv->num_kv_heads;
        cut(int(i % job.kv->num_kv_heads), row + tile * num_rows / num_tiles, row + (tile + 1) * num_rows / num_tiles);
    }
    return num_tiles * job.kv->num_kv_heads;
}

// The tiles of sequence `seq`; all of them are written to `items` when it is not null.
long cut_tiles(const Job& job, int seq, Item* items) {
    const int group = job.kv->num_heads / job.kv->num_kv_heads;
    const int first = job.step->cu_seqlens[seq], num_tokens = job.step->cu_seqlens[seq + 1] - first;
    const int base = job.step->context_lens[seq] - num_tokens, num_straight = count_straight(job, seq);
    const auto write = [&](Item item) { if (items) *items++ = item; };
    const auto start_of = [&](long position) { return int(first_key(job, position)) / KEYS * KEYS; };
    long num = 0;
    for (int token = 0, end; token < num_straight; token = end) {
        end = dual(job) ? std::min(num_straight, int(chunk_start(job, base + token) - job.window) - base) : num_straight;
        num += cut_rows(job, long(token) * group, long(end) * group, [&](int head, long row, long end) {
            write({seq, head, int(row), int(end - row), start_of(base + row / group), base + int((end - 1) / group) + 1});
        });
    }
    for (int place = num_straight; place < num_tokens; place++) {
        const int to = base + __builtin_popcountll(ancestors_of(job, first + place));
        num += cut_rows(job, long(place) * group, long(place + 1) * group, [&](int head, long row, long end) {
            write({seq, head, int(row), int(end - row), start_of(to - 1), to, base / CHUNK * CHUNK});
        });
    }
    return num;
}

// Two items at a time, unless the longest two would be more than a thread's share.
void attend_whole(const Job& job, const Item* items, long num_items) {
    long all = 0, longest = 0;
    for (long i = 0; i < num_items; i++) {
        const long num_keys = items[i].to - items[i].from;
        all += num_keys, longest = std::max(longest, num_keys);
    }
    const long grain = 2 * longest * job.threads <= all ? 2 : 1;
    parallel_for(job.threads, (num_items + grain - 1) / grain, 1, [&](long i, int) {
        const long end = num_items - i * grain, begin = std::max(0L, end - grain);  // the longest of a prefill first
        if (end - begin == 2 && are_neighbours(items[begin], items[begin + 1]))
            return with_rows(items[begin].num_rows, [&](auto rows) {
                attend_pair<rows.value>(job, items[begin], items[begin + 1]);
            });
        for (long at = end; at-- > begin;)
            with_rows(items[at].num_rows, [&](auto rows) { attend_item<rows.value>(job, items[at]); });
    });
}

// For few items over long contexts: the spans of all items are shared out, and then the items, whose spans are merged.
int attend_split(const Job& job, const Item* items, long num_items) {
    Scratch numbers((num_items + 1) * sizeof(long));
    long* first = (long*)numbers.data;  // part of an item, among those of all
    if (!first) return OUT_OF_MEMORY;
    int most_rows = 0;
    first[0] = 0;
    for (long i = 0; i < num_items; i++) {
        first[i + 1] = first[i] + count_parts(items[i]);
        most_rows = std::max(most_rows, items[i].num_rows);
    }
    const long num_parts = first[num_items], size = most_rows * (2L + job.kv->head_dim);  // floats of a part
    Scratch scratch(num_parts * size * sizeof(float));
    float* parts = (float*)scratch.data;
    if (!parts) return OUT_OF_MEMORY;
    parallel_for(job.threads, num_parts, 1, [&](long part, int) {
        const long i = std::upper_bound(first, first + num_items, part) - first - 1;
        with_rows(items[i].num_rows, [&](auto rows) {
            attend_part<rows.value>(job, items[i], part - first[i], parts + part * size);
        });
    });
    parallel_for(job.threads, num_items, std::max(1L, MERGED_FLOATS * num_items / (num_parts * size)), [&](long i, int) {
        with_rows(items[i].num_rows, [&](auto rows) {
            merge_parts<rows.value>(job, items[i], first[i + 1] - first[i], parts + first[i] * size, size);
        });
    });
    return OK;
}

// Gives items with paths of their own what those lie in, out of `room`. Returns what is needed, or nothing but that
// where there is none.
long place_paths(const Job& job, Item* items, long num_items, char* room) {
    long bytes = 0;
    for (long i = 0; i < num_items; i++) {
        if (!items[i].has_path()) continue;
        if (room) items[i].keys = room + bytes;
        bytes += path_bytes(job, items[i]);
    }
    return bytes;
}

int attend(const Job& job) {
    long num_items = 0, max_parts = 1;
    for (int seq = 0; seq < job.step->num_seqs; seq++) num_items += cut_tiles(job, seq, nullptr);
    if (num_items == 0) return OK;
    Scratch scratch(num_items * sizeof(Item));
    Item* items = (Item*)scratch.data;
    if (!items) return OUT_OF_MEMORY;
    for (long seq = 0, at = 0; seq < job.step->num_seqs; seq++) at += cut_tiles(job, int(seq), items + at);
    for (long i = 0; i < num_items; i++) max_parts = std::max<long>(max_parts, count_parts(items[i]));
    const long bytes = job.step->ancestors ? place_paths(job, items, num_items, nullptr) : 0;
    Scratch paths(bytes);
    if (bytes) {
        if (!paths.data) return OUT_OF_MEMORY;
        place_paths(job, items, num_items, (char*)paths.data);
        parallel_for(job.threads, num_items, 1, [&](long i, int) { if (items[i].has_path()) lay_path(job, items[i]); });
    }
    if (job.threads > 1 && max_parts > 1 && num_items < 4L * job.threads)
        return attend_split(job, items, num_items);
    attend_whole(job, items, num_items);
    return OK;
}
}  // namespace

EXPORT int blade_attend(const AttendCall* call) { return attend(*call); }
