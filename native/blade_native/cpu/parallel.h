// Loops over all cores by a pool that never waits for a thread which has not started.
//
// Workers join an open loop when they get to it, and the caller waits only for workers in the middle of an item. So a
// core that another process has taken costs its share of the speed, where a team with a barrier at its end (OpenMP's)
// would wait out the other process's time slice on every operation. A worker without work spins for a moment, for in a
// model's step the next operation is microseconds away, and then sleeps; while it spins it fetches what it will read.
#pragma once
#include <algorithm>
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

// [0, count) cut into a part for each thread.
struct Parts {
    static constexpr int MOST = 256;  // more threads do not take part
    long count;
    int num;
    Parts(int threads, long count) : count(count), num(int(std::min<long>({threads, MOST, count}))) {}
    long start(int part) const { return part * count / num; }
};

// Items of work out of [0, count), each of them a few numbers that lie far apart. A thread's part is cut into runs, and
// its items take one number of each run: what lies there is read faster from several places of memory at once.
struct Strided {
    long first, num, stride;
    long at(long i) const { return first + i * stride; }
};
struct Cut {
    Parts parts;
    long runs, per_part;  // runs of a part, at most, and its items
    Cut(int threads, long count, long runs)
        : parts(threads, count), runs(runs), per_part(run_length((count + parts.num - 1) / parts.num)) {}
    long num_items() const { return parts.num * per_part; }
    long run_length(long part) const { return (part + runs - 1) / runs; }
    Strided item(long i) const {
        long start = parts.start(int(i / per_part)), length = parts.start(int(i / per_part) + 1) - start;
        long run = run_length(length), first = i % per_part;
        return {start + first, first < run ? (length - first + run - 1) / run : 0, run};
    }
};

// As parallel_for with items that follow each other in memory: each thread takes those of its own part in order, and
// then helps the others with what is left of theirs.
template <class Body>
void parallel_parts(int threads, long count, Body body) {
    struct alignas(64) Part {
        std::atomic<long> next;
        long end;
    };
    struct Loop {
        Body& body;
        int num;
        Part parts[Parts::MOST];  // of which num are used: the others are not touched
        Loop(Body& body, int num) : body(body), num(num) {}

        static void run(void* context, int thread) {
            Loop& loop = *(Loop*)context;
            for (int i = 0; i < loop.num; i++) {
                Part& part = loop.parts[(thread + i) % loop.num];
                for (long at; (at = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;)
                    loop.body(at, thread);
            }
        }
    };
    Parts parts(threads, count);
    Loop loop(body, parts.num);
    for (int i = 0; i < parts.num; i++) {
        loop.parts[i].next.store(parts.start(i), std::memory_order_relaxed);
        loop.parts[i].end = parts.start(i + 1);
    }
    run_parallel(parts.num, Loop::run, &loop);
}

// Tells that the next parallel_parts will read data [count][bytes] in the items of a cut, so that threads which wait until
// then may fetch what begins the runs of their parts. A guess will do, and no bytes take it back.
void expect_parts(const char* data, long bytes, const Cut& cut);
