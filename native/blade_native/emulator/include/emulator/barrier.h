// __syncthreads and its variants. Stricter than a device: all threads of the block have to be alive and to meet at the
// same line, which is what CUDA asks for and hardware does not check.
#pragma once
#include "emulator/schedule.h"

namespace emulator {

struct Votes {
  int any = 0, all = 1, count = 0;
};
inline Votes votes, result;  // of the barrier that gathers, of the last one that released

EMULATOR_CORE static void release_barrier() {
  Thread* waiting[MAX_THREADS];
  int count = 0;
  for (int i = 0; i < block.num_threads; ++i)
    if (threads[i].state == State::AT_BARRIER) waiting[count++] = &threads[i];
  const Site first = waiting[0]->site;
  for (int i = 1; i < count; ++i) {
    const Site other = waiting[i]->site;
    if (!(other == first))
      fail("divergent __syncthreads: %s:%d and %s:%d", first.file, first.line, other.file, other.line);
  }
  if (block.num_alive != block.num_threads)
    fail("__syncthreads at %s:%d after some threads of the block have returned", first.file, first.line);
  block.num_at_barrier = 0;
  result = votes;
  votes = Votes{};
  make_ready(waiting, count);
}

EMULATOR_CORE static Votes sync_block(int predicate, Site site) {
  publish(&block.order);
  current->site = site;
  current->operation = "__syncthreads";
  current->state = State::AT_BARRIER;
  votes.any |= predicate != 0;
  votes.all &= predicate != 0;
  votes.count += predicate != 0;
  if (++block.num_at_barrier == block.num_alive) release_barrier();
  run_next();
  observe(&block.order);
  return result;
}

}  // namespace emulator

static inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::sync_block(0, site); }
static inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::sync_block(predicate, site).any;
}
static inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::sync_block(predicate, site).all;
}
static inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::sync_block(predicate, site).count;
}
