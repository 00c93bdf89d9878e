#include "parallel.h"

#include <sched.h>

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

namespace {
// The state of the pool is one word, so that joining and closing cannot cross: an epoch, whether its job is open to
// join, and how many workers are in it.
constexpr uint64_t EPOCH = 1 << 17, OPEN = 1 << 16, ACTIVE = OPEN - 1;
constexpr int SPINS = 8000;  // some 100 us of pauses
constexpr int SPINS_BEFORE_YIELD = 200;
constexpr long FETCHED_BYTES = 256 * 1024;  // of a part, at most: half of a small L2

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// What expect_parts tells. Its fields may be torn when they change: a thread then fetches some lines in vain.
class Expected {
public:
    void set(const char* data, long bytes, const Cut& cut) {
        data_.store(data, std::memory_order_relaxed);
        bytes_.store(bytes, std::memory_order_relaxed);
        count_.store(cut.parts.count, std::memory_order_relaxed);
        runs_.store(cut.runs, std::memory_order_relaxed);
        num_.store(cut.parts.num, std::memory_order_relaxed);
        version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    }

    // How far one thread has come with fetching: `at` bytes of each run.
    struct Progress {
        uint64_t version = 0;
        const char* start = nullptr;
        long run_bytes = 0, runs = 1, at = 0, end = 0;
    };

    // Fetches the next lines of a thread's part; false where there are none.
    bool fetch(int thread, Progress& progress) const {
        if (uint64_t version = version_.load(std::memory_order_acquire); version != progress.version)
            progress = start(thread, version);
        if (progress.at >= progress.end) return false;
        for (long run = 0; run < progress.runs; run++)
            __builtin_prefetch(progress.start + run * progress.run_bytes + progress.at, 0, 2);
        progress.at += 64;
        return true;
    }

private:
    Progress start(int thread, uint64_t version) const {
        long num = num_.load(std::memory_order_relaxed), count = count_.load(std::memory_order_relaxed);
        long bytes = bytes_.load(std::memory_order_relaxed), runs = runs_.load(std::memory_order_relaxed);
        if (thread >= num) return {version};
        long from = thread * count / num, length = (thread + 1) * count / num - from;
        long run_bytes = (length + runs - 1) / runs * bytes;
        const char* at = data_.load(std::memory_order_relaxed) + from * bytes;
        return {version, at, run_bytes, runs, 0, std::min(run_bytes, FETCHED_BYTES / runs)};
    }

    alignas(64) std::atomic<uint64_t> version_{0};
    std::atomic<const char*> data_{nullptr};
    std::atomic<long> bytes_{0}, count_{0}, runs_{1};
    std::atomic<int> num_{0};
};

class Pool {
public:
    Expected expected;

    void run(int threads, void (*body)(void*, int), void* context) {
        if (threads == 1 || busy_.test_and_set(std::memory_order_acquire)) return body(context, 0);
        grow(threads - 1);
        body_ = body, context_ = context, threads_ = threads;
        uint64_t epoch = (state_.load(std::memory_order_relaxed) & ~(OPEN | ACTIVE)) + EPOCH;
        state_.store(epoch | OPEN);
        if (num_asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        body(context, 0);
        state_.fetch_and(~OPEN);
        for (int spins = 0; state_.load(std::memory_order_acquire) & ACTIVE;) wait(0, progress_, ++spins);
        busy_.clear(std::memory_order_release);
    }

private:
    void grow(int num_workers) {
        try {
            for (; num_workers_ < num_workers; num_workers_++)
                std::thread(&Pool::work, this, num_workers_ + 1).detach();
        } catch (const std::exception&) {
        }  // the threads that there are will do
    }

    [[noreturn]] void work(int thread) {
        Expected::Progress progress;
        for (uint64_t seen = 0;;) {
            uint64_t state = wait_beyond(seen, thread, progress);
            seen = state & ~ACTIVE;
            if (thread >= threads_.load(std::memory_order_relaxed)) continue;
            while ((state & ~ACTIVE) == seen && !state_.compare_exchange_weak(state, state + 1)) continue;
            if ((state & ~ACTIVE) != seen) continue;  // closed meanwhile
            body_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), thread);
            state_.fetch_sub(1, std::memory_order_release);
        }
    }

    bool fresh(uint64_t state, uint64_t seen) const { return (state & OPEN) && (state & ~ACTIVE) != seen; }

    void wait(int thread, Expected::Progress& progress, int spins) const {
        if (spins % SPINS_BEFORE_YIELD == 0)
            sched_yield();
        else if (!expected.fetch(thread, progress))
            pause();
    }

    // The state once a job is open that this worker has not seen.
    uint64_t wait_beyond(uint64_t seen, int thread, Expected::Progress& progress) {
        uint64_t state;
        for (int spins = 1; spins < SPINS; spins++) {
            if (fresh(state = state_.load(std::memory_order_acquire), seen)) return state;
            wait(thread, progress, spins);
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_++;  // before the state is looked at again: run() stores the state before it looks here
        wake_.wait(lock, [&] { return fresh(state = state_.load(), seen); });
        num_asleep_--;
        return state;
    }

    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int> num_asleep_{0};
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;  // a second caller at the same time works alone
    std::atomic<void (*)(void*, int)> body_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int> threads_{0};
    int num_workers_ = 0;
    Expected::Progress progress_;  // of the caller
    std::mutex mutex_;
    std::condition_variable wake_;
};

Pool& pool() {
    static Pool* pool = new Pool;  // never destroyed: workers may still sleep in it when the process exits
    return *pool;
}
}  // namespace

void run_parallel(int threads, void (*body)(void*, int), void* context) { pool().run(threads, body, context); }

void expect_parts(const char* data, long bytes, const Cut& cut) { pool().expected.set(data, bytes, cut); }
