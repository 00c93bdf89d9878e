#include "parallel.h"

#include <sched.h>

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace {
// The state of the pool is one word, so that joining and closing cannot cross: an epoch, whether its job is open to
// join, and how many workers are in it.
constexpr uint64_t EPOCH = 1 << 17, OPEN = 1 << 16, ACTIVE = OPEN - 1;
constexpr int SPINS = 8000;  // some 100 us of pauses
constexpr int SPINS_BEFORE_YIELD = 200;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

class Pool {
public:
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
        for (int spins = 0; state_.load(std::memory_order_acquire) & ACTIVE;)
            if (++spins % SPINS_BEFORE_YIELD) pause(); else sched_yield();
        busy_.clear(std::memory_order_release);
    }

private:
    void grow(int num_workers) {
        try {
            for (; num_workers_ < num_workers; num_workers_++)
                std::thread(&Pool::work, this, num_workers_ + 1).detach();
        } catch (const std::system_error&) {
        }  // the threads that there are will do
    }

    [[noreturn]] void work(int thread) {
        for (uint64_t seen = 0;;) {
            uint64_t state = wait_beyond(seen);
            seen = state & ~ACTIVE;
            if (thread >= threads_.load(std::memory_order_relaxed)) continue;
            while ((state & ~ACTIVE) == seen && !state_.compare_exchange_weak(state, state + 1)) continue;
            if ((state & ~ACTIVE) != seen) continue;  // closed meanwhile
            body_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), thread);
            state_.fetch_sub(1, std::memory_order_release);
        }
    }

    bool fresh(uint64_t state, uint64_t seen) const { return (state & OPEN) && (state & ~ACTIVE) != seen; }

    // The state once a job is open that this worker has not seen.
    uint64_t wait_beyond(uint64_t seen) {
        uint64_t state;
        for (int spins = 1; spins < SPINS; spins++) {
            if (fresh(state = state_.load(std::memory_order_acquire), seen)) return state;
            if (spins % SPINS_BEFORE_YIELD) pause(); else sched_yield();
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
    std::mutex mutex_;
    std::condition_variable wake_;
};
}  // namespace

void run_parallel(int threads, void (*body)(void*, int), void* context) {
    static Pool* pool = new Pool;  // never destroyed: workers may still sleep in it when the process exits
    pool->run(threads, body, context);
}
