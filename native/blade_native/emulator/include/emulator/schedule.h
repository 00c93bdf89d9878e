// Which thread of the block runs next: a queue, first in first out, permuted under a seed.
#pragma once
#include <cstdarg>

#include "emulator/fiber.h"

namespace emulator {

struct Warp {
  unsigned alive = 0, waiting = 0;  // bits of lanes
  char order = 0;                   // its address is what __syncwarp orders by
};

struct Block {
  int num_threads = 0, num_alive = 0, num_at_barrier = 0;
  Warp warps[MAX_THREADS / WARP];
  int queue[MAX_THREADS + 1];  // numbers of ready threads, a ring
  int head = 0, tail = 0;
  unsigned char* shared = nullptr;  // dynamic shared memory
  size_t shared_bytes = 0;
  char order = 0;  // its address is what __syncthreads orders by
};

inline Block block;
inline uint3 block_index{};                 // blockIdx
inline dim3 block_dimensions, grid_dimensions;  // blockDim, gridDim
inline char error[1024];
inline uint64_t random_state = 0;  // 0: no permutation

static inline void* dynamic_shared() { return block.shared; }

EMULATOR_CORE static unsigned random_below(unsigned bound) {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return static_cast<unsigned>((z ^ z >> 31) % bound);
}

template <class T>
EMULATOR_CORE static void permute(T* items, size_t count) {
  if (!random_state) return;
  for (size_t i = count; i > 1; --i) {
    const size_t j = random_below(static_cast<unsigned>(i));
    const T item = items[i - 1];
    items[i - 1] = items[j];
    items[j] = item;
  }
}

EMULATOR_CORE static void make_ready(Thread** released, int count) {
  permute(released, count);
  for (int i = 0; i < count; ++i) {
    released[i]->state = State::READY;
    block.queue[block.tail++ % (MAX_THREADS + 1)] = released[i]->number;
  }
}

// Leave the current thread for the next ready one, for the host where there is none.
EMULATOR_CORE static void run_next() {
  Thread* next = block.head == block.tail ? &host : &threads[block.queue[block.head++ % (MAX_THREADS + 1)]];
  if (next != current) switch_to(next);
}

// End the launch: the block's other threads are abandoned where they are.
EMULATOR_CORE [[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
  const uint3 b = block_index, t = current->index;
  const int n = snprintf(error, sizeof error, "block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error + n, sizeof error - n, format, arguments);
  va_end(arguments);
  current->state = State::DONE;
  switch_to(&host);
  abort();  // nobody returns to a thread that failed
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_dimensions)
#define gridDim (emulator::grid_dimensions)
static constexpr int warpSize = emulator::WARP;
