// A mixture of experts (Shazeer et al. 2017): each token goes through the gated MLPs (Shazeer 2020) that its router
// chose, and their weighted sum is its result. Tokens are sorted by expert, so that an expert's weights are read once;
// the panels of all experts are one pool of work, so that eight small matrices keep as many threads busy as a large one.
//
//   pack       the rows of each expert as its first matrix wants them, weighed where the input is; else a token alone
//              with several experts once for all
//   gate, up   items (expert, panels); who ends an expert's last one packs silu(gate) * up for the second matrix
//   down       items of output columns: each goes through all experts in order and adds onto its columns of the tokens
//
// Between the two matrices everything is float32. A token's sums go by expert in order, so its row does not depend on
// what stands beside it.
#include <atomic>
#include <new>
#include <vector>

#include "linear_job.h"
#include "parallel.h"

namespace {
constexpr long TOKENS_AT_ONCE = 1024;  // bounds the scratch; the weights are worth reading again for the next ones
constexpr long FETCHED_BYTES = 2048;   // of what comes next
constexpr long PACK_GRAIN = 4;         // tiles; fewer are not worth another thread

// A linear over m rows, which pack_tile is given, into floats with y_stride between rows.
LinearCall call_of(const Linear* linear, int x_dtype, long m, long y_stride, int threads) {
    return {linear, nullptr, x_dtype, m, nullptr, FLOAT32, y_stride, threads};
}

// What an expert's second matrix is multiplied by.
int hidden_dtype(const Linear* down) { return down->format.bits == 16 && !WIDENS_BF16 ? BFLOAT16 : FLOAT32; }

void fetch(const char* at) {
    for (long i = 0; i < FETCHED_BYTES; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Whether both pack a row alike: for certain where they differ in nothing but their numbers.
bool pack_alike(Linear a, Linear b) {
    a.weights = b.weights = nullptr, a.bias = b.bias = nullptr;
    return memcmp(&a, &b, sizeof(Linear)) == 0;
}

// One expert and the tokens that chose it.
struct Expert {
    const Target* targets;
    Job gate_up, down;
    long first_item = 0;  // of gate_up, among those of all experts
};

struct PackItem {
    long expert, tile;
};

class Mixture {
public:
    Mixture(const ExpertsCall& c, long first, long m)
        : c_(c), x_((const char*)c.x + first * c.d * element()), y_((char*)c.y + first * c.d * element()), m_(m),
          ids_(c.ids + first * c.k), weights_(c.weights + first * c.k) {}

    int run() {
        if (!sort()) return OUT_OF_RANGE;
        plan();
        Scratch scratch(lay_out(nullptr));
        if (!scratch.data) return OUT_OF_MEMORY;
        lay_out((char*)scratch.data);
        pack();
        gate_up();
        down();
        return OK;
    }

private:
    long element() const { return c_.dtype == FLOAT32 ? 4 : 2; }

    // Sorts (token, expert) pairs by expert; false where an id is none.
    bool sort() {
        starts_.assign(c_.num_experts + 1, 0);
        targets_.resize(m_ * c_.k);
        for (long i = 0; i < m_ * c_.k; i++) {
            if (uint64_t(ids_[i]) >= uint64_t(c_.num_experts)) return false;
            starts_[ids_[i] + 1]++;
        }
        for (long e = 0; e < c_.num_experts; e++) starts_[e + 1] += starts_[e];
        std::vector<long> next(starts_.begin(), starts_.end() - 1);
        if (c_.weigh_input) shares_.resize(m_ * c_.k);
        for (long i = 0; i < m_ * c_.k; i++) {
            long place = next[ids_[i]]++;
            targets_[place] = {int32_t(i / c_.k), c_.weigh_input ? 1.0f : weights_[i]};
            if (c_.weigh_input) shares_[place] = weights_[i];
        }
        return true;
    }

    void plan() {
        experts_.reserve(std::min<long>(c_.num_experts, m_ * c_.k));
        for (long e = 0; e < c_.num_experts; e++)
            if (long rows = starts_[e + 1] - starts_[e]) {
                const Linear *gate_up = c_.gate_up[e], *down = c_.down[e];
                LinearCall first = call_of(gate_up, c_.dtype, rows, 2 * c_.inner, c_.threads);
                LinearCall second = call_of(down, hidden_dtype(down), rows, c_.d, c_.threads);
                experts_.push_back({targets_.data() + starts_[e], Job(first), Job(second), num_items_});
                num_items_ += experts_.back().gate_up.num_items();
            }
        left_ = std::vector<std::atomic<long>>(experts_.size());
        for (size_t i = 0; i < experts_.size(); i++) left_[i] = experts_[i].gate_up.num_items();
    }

    // Gives everything its place behind `at`, and the bytes of the whole. Without a place it only counts.
    size_t lay_out(char* at) {
        char* const start = at;
        auto take = [&](long bytes) {
            char* place = at;
            at += aligned(bytes);
            return place;
        };
        sums_ = c_.dtype == FLOAT32 ? (float*)y_ : (float*)take(m_ * c_.d * 4);
        std::vector<const Expert*> alone(m_, nullptr);  // by token: who holds its row packed, where it is a tile of its own
        pack_items_.clear();
        for (Expert& expert : experts_) {
            long index = &expert - experts_.data(), rows = expert.gate_up.tiling.m;
            expert.gate_up.call.y = take(rows * 2 * c_.inner * 4);
            expert.down.tiles = take(expert.down.packed_bytes());
            expert.down.targets = expert.targets, expert.down.call.y = sums_;
            const Expert*& other = alone[expert.targets[0].row];
            if (rows == 1 && other && !c_.weigh_input && pack_alike(other->gate_up.linear, expert.gate_up.linear)) {
                expert.gate_up.tiles = other->gate_up.tiles;
                continue;
            }
            expert.gate_up.tiles = take(expert.gate_up.packed_bytes());
            if (rows == 1) other = &expert;
            for (long tile = 0; tile < expert.gate_up.tiling.num_tiles; tile++) pack_items_.push_back({index, tile});
        }
        per_thread_ = 0, rows_bytes_ = 0;
        for (const Expert& expert : experts_)
            for (const Job* job : {&expert.gate_up, &expert.down}) {
                per_thread_ = std::max(per_thread_, job->per_thread);
                rows_bytes_ = std::max(rows_bytes_, aligned(job->most_rows * job->linear.k * 4));
            }
        per_thread_ += rows_bytes_;
        scratch_ = take(c_.threads * per_thread_);
        return at - start;
    }

    char* rows_of(int thread) const { return scratch_ + thread * per_thread_; }
    char* scratch_of(int thread) const { return rows_of(thread) + rows_bytes_; }

    void pack() {
        parallel_for(c_.threads, pack_items_.size(), PACK_GRAIN, [&](long i, int thread) {
            PackItem item = pack_items_[i];
            const Expert& expert = experts_[item.expert];
            const Job& job = expert.gate_up;
            long start = job.tiling.start(item.tile), row_bytes = job.linear.k * element();
            char* rows = rows_of(thread);
            for (int r = 0; r < job.tiling.height(item.tile); r++, rows += row_bytes) {
                copy_row(expert.targets + start + r, rows);
                memset(rows + c_.d * element(), 0, row_bytes - c_.d * element());
            }
            pack_tile(job, item.tile, rows_of(thread));
        });
    }

    void copy_row(const Target* target, char* out) const {
        const char* row = x_ + target->row * c_.d * element();
        if (!c_.weigh_input)
            memcpy(out, row, c_.d * element());
        else if (c_.dtype == FLOAT32)
            weigh((const float*)row, shares_[target - targets_.data()], (float*)out);
        else
            weigh((const bf16*)row, shares_[target - targets_.data()], (bf16*)out);
    }

    template <class E>
    void weigh(const E* row, float share, E* out) const {
        E rounded;
        vec::store_some(&rounded, vec::set(share), 1);
        vec::F factor = vec::set(vec::to_float(rounded));
        vec::for_lanes(c_.d, [&](long i, int lanes) {
            vec::store_some(out + i, vec::mul(vec::load_some(row + i, lanes), factor), lanes);
        });
    }

    void gate_up() {
        parallel_parts(c_.threads, num_items_, [&](long item, int thread) {
            auto before = [](long item, const Expert& expert) { return item < expert.first_item; };
            long i = std::upper_bound(experts_.begin(), experts_.end(), item, before) - experts_.begin() - 1;
            const Expert& expert = experts_[i];
            multiply_item(expert.gate_up, item - expert.first_item, scratch_of(thread));
            if (left_[i].fetch_sub(1, std::memory_order_acq_rel) == 1) pack_hidden(expert, rows_of(thread));
        });
    }

    void pack_hidden(const Expert& expert, char* rows) {
        const Job& job = expert.down;
        for (long tile = 0; tile < job.tiling.num_tiles; tile++) {
            for (int r = 0; r < job.tiling.height(tile); r++) {
                long row = job.tiling.start(tile) + r;
                const float* products = (const float*)expert.gate_up.call.y + row * 2 * c_.inner;
                if (job.call.x_dtype == FLOAT32)
                    silu_mul(products, job.linear.k, (float*)rows + r * job.linear.k);
                else
                    silu_mul(products, job.linear.k, (bf16*)rows + r * job.linear.k);
            }
            pack_tile(job, tile, rows);
        }
    }

    // products [2 inner] -> silu(first half) * second half, padded with zeros to k.
    template <class E>
    void silu_mul(const float* products, long k, E* out) {
        vec::for_lanes(c_.inner, [&](long i, int lanes) {
            vec::F gate = vec::load_some(products + i, lanes), up = vec::load_some(products + c_.inner + i, lanes);
            vec::store_some(out + i, vec::mul(vec::silu(gate), up), lanes);
        });
        memset(out + c_.inner, 0, (k - c_.inner) * sizeof(E));
    }

    void down() {
        const long num_panels = experts_[0].down.num_panels;
        long chunk = 1;
        for (const Expert& expert : experts_) chunk = std::max(chunk, expert.down.chunk);
        const Cut cut(c_.threads, num_panels, chunk);
        parallel_parts(c_.threads, cut.num_items(), [&](long item, int thread) {
            const Strided panels = cut.item(item);
            for_columns(panels, [&](float* sums, void*, long width) { memset(sums, 0, width * 4); });
            for (size_t i = 0; i < experts_.size(); i++) {
                if (i + 1 < experts_.size() && panels.num) fetch(experts_[i + 1].down.panel(panels.first));
                multiply_panels(experts_[i].down, panels, scratch_of(thread));
            }
            if (c_.dtype == BFLOAT16)
                for_columns(panels, [](float* sums, void* y, long width) { round(sums, width, (bf16*)y); });
        });
    }

    // Calls body(sums, y, width) for the columns of each panel and row.
    template <class Body>
    void for_columns(Strided panels, Body body) {
        for (long i = 0; i < panels.num; i++) {
            long column = panels.at(i) * PANEL, width = std::min<long>(PANEL, c_.d - column);
            for (long at = column; at < m_ * c_.d; at += c_.d) body(sums_ + at, y_ + at * element(), width);
        }
    }

    static void round(const float* sums, long width, bf16* y) {
        vec::for_lanes(width, [&](long i, int lanes) {
            vec::store_some(y + i, vec::load_some(sums + i, lanes), lanes);
        });
    }

    const ExpertsCall& c_;
    const char* x_;
    char* y_;
    const long m_;
    const int64_t* ids_;
    const float* weights_;
    std::vector<long> starts_;     // by expert, of its pairs
    std::vector<Target> targets_;  // of all pairs
    std::vector<float> shares_;    // of the input, of all pairs; empty where the outputs are weighed
    std::vector<Expert> experts_;  // that have tokens
    std::vector<std::atomic<long>> left_;  // by expert: items of gate_up that are not done
    std::vector<PackItem> pack_items_;
    long num_items_ = 0, per_thread_ = 0, rows_bytes_ = 0;
    float* sums_ = nullptr;  // [m][d]
    char* scratch_ = nullptr;
};
}  // namespace

EXPORT int blade_experts(const ExpertsCall* call) {
    try {
        for (long first = 0; first < call->m; first += TOKENS_AT_ONCE) {
            Mixture mixture(*call, first, std::min<long>(TOKENS_AT_ONCE, call->m - first));
            if (int status = mixture.run()) return status;
        }
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    return OK;
}
