// Loops over all cores by a pool that never waits for a thread which has not started.
//
// Workers join an open loop when they get to it, and everybody takes items from one counter; the caller waits only for
// workers in the middle of an item. So a core that another process has taken costs its share of the speed, where a
// team with a barrier at its end (OpenMP's) would wait out the other process's time slice on every operation. A worker
// without work spins for a moment, for in a model's step the next operation is microseconds away, and then sleeps.
#pragma once
#include <atomic>

// Runs body(context, thread) on the calling thread as thread 0 and on up to threads - 1 workers, at the same time or,
// on a busy machine, not at all: body must take its work from something shared.
void run_parallel(int threads, void (*body)(void* context, int thread), void* context);

// body(i, thread) for i in [0, count), handed out `grain` at a time in order; thread < threads.
template <class Body>
void parallel_for(int threads, long count, long grain, Body body) {
    struct Loop {
        Body& body;
        long count, grain;
        std::atomic<long> next{0};

        static void run(void* context, int thread) {
            Loop& loop = *(Loop*)context;
            for (long start; (start = loop.next.fetch_add(loop.grain, std::memory_order_relaxed)) < loop.count;)
                for (long i = start; i < loop.count && i < start + loop.grain; i++) loop.body(i, thread);
        }
    } loop{body, count, grain};
    run_parallel(count > grain ? threads : 1, Loop::run, &loop);
}
