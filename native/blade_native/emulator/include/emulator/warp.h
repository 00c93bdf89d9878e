// Warp collectives: shuffles, votes, matches, reductions and __syncwarp. Every lane parks its operand; the last one to
// arrive combines them all. Only __syncwarp orders memory, as on a device.
#pragma once
#include "emulator/schedule.h"

namespace emulator {

// Copies that ThreadSanitizer does not attribute to a thread, because hardware moves these bytes between registers.
static inline __attribute__((always_inline)) void move_bytes(void* target, const void* source, size_t bytes) {
  asm volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(bytes)::"memory");
}

// Run `combine` and release the lanes if all that `mask` names and that live are here with this very mask.
EMULATOR_CORE static bool complete(int warp_number, unsigned mask, Combine combine) {
  Warp& warp = block.warps[warp_number];
  const unsigned needed = mask & warp.alive;
  if ((warp.waiting & needed) != needed) return false;
  Thread* lanes[WARP];
  void* operands[WARP] = {};
  int count = 0;
  for (int lane = 0; lane < WARP; ++lane) {
    if (!(needed >> lane & 1)) continue;
    Thread& thread = threads[warp_number * WARP + lane];
    if (thread.mask != mask) return false;
    const Site here = thread.site, first = count ? lanes[0]->site : here;
    if (thread.combine != combine || !(here == first))
      fail("divergent warp: %s at %s:%d and %s at %s:%d", lanes[0]->operation, first.file, first.line,
           thread.operation, here.file, here.line);
    operands[lane] = thread.operand;
    lanes[count++] = &thread;
  }
  if (combine) combine(operands, needed);
  warp.waiting &= ~needed;
  make_ready(lanes, count);
  return true;
}

EMULATOR_CORE static void collective(const char* operation, unsigned mask, void* operand, Combine combine, Site site) {
  Warp& warp = block.warps[current->warp];
  if (!(mask >> current->lane & 1))
    fail("%s at %s:%d: the mask %08x lacks the calling lane %d", operation, site.file, site.line, mask, current->lane);
  current->site = site;
  current->operation = operation;
  current->mask = mask;
  current->combine = combine;
  current->operand = operand;
  current->state = State::IN_COLLECTIVE;
  warp.waiting |= 1u << current->lane;
  complete(current->warp, mask, combine);
  run_next();
}

// Of a lane that returns from the kernel: it may be the last one that others waited for.
EMULATOR_CORE static void leave_warp() {
  Warp& warp = block.warps[current->warp];
  warp.alive &= ~(1u << current->lane);
  for (int lane = 0; lane < WARP; ++lane) {
    if (!(warp.waiting >> lane & 1)) continue;
    const Thread& thread = threads[current->warp * WARP + lane];
    complete(current->warp, thread.mask, thread.combine);
  }
}

template <class T>
struct Shuffle {
  T value, received;
  int source;
};

template <class T>
EMULATOR_CORE static void combine_shuffle(void** operands, unsigned lanes) {
  for (int lane = 0; lane < WARP; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto* mine = static_cast<Shuffle<T>*>(operands[lane]);
    if (lanes >> mine->source & 1)
      move_bytes(&mine->received, &static_cast<Shuffle<T>*>(operands[mine->source])->value, sizeof(T));
    else  // a lane that does not take part: undefined in CUDA, poison here
      for (size_t i = 0; i < sizeof(T); ++i) reinterpret_cast<volatile unsigned char*>(&mine->received)[i] = 0xFF;
  }
}

template <class T>
static T shuffle(const char* operation, unsigned mask, T value, int source, Site site) {
  Shuffle<T> operand{value, value, source};
  collective(operation, mask, &operand, combine_shuffle<T>, site);
  return operand.received;
}

// First lane of the current lane's segment of `width` lanes.
static inline int segment(int width) { return current->lane & ~(width - 1); }

template <class T>
struct Exchange {  // every lane gets every participant's value
  T value;
  T all[WARP];
  unsigned lanes;
};

template <class T>
EMULATOR_CORE static void combine_exchange(void** operands, unsigned lanes) {
  for (int to = 0; to < WARP; ++to) {
    if (!(lanes >> to & 1)) continue;
    auto* mine = static_cast<Exchange<T>*>(operands[to]);
    mine->lanes = lanes;
    for (int from = 0; from < WARP; ++from)
      if (lanes >> from & 1) move_bytes(&mine->all[from], &static_cast<Exchange<T>*>(operands[from])->value, sizeof(T));
  }
}

template <class T>
static Exchange<T> exchange(const char* operation, unsigned mask, T value, Site site) {
  Exchange<T> operand{value, {}, 0};
  collective(operation, mask, &operand, combine_exchange<T>, site);
  return operand;
}

static inline unsigned ballot(const char* operation, unsigned mask, int predicate, Site site) {
  const auto votes = exchange<int>(operation, mask, predicate != 0, site);
  unsigned bits = 0;
  for (int lane = 0; lane < WARP; ++lane) bits |= unsigned(votes.lanes >> lane & 1 && votes.all[lane]) << lane;
  return bits;
}

template <class T, class Join>
static T reduce(const char* operation, unsigned mask, T value, Site site, Join join) {
  const auto values = exchange<T>(operation, mask, value, site);
  bool is_first = true;
  for (int lane = 0; lane < WARP; ++lane) {
    if (!(values.lanes >> lane & 1)) continue;
    value = is_first ? values.all[lane] : join(value, values.all[lane]);
    is_first = false;
  }
  return value;
}

}  // namespace emulator

#define EMULATOR_HERE emulator::Site site = emulator::Site::here()

static inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_HERE) {
  char* order = &emulator::block.warps[emulator::current->warp].order;
  emulator::publish(order);
  emulator::collective("__syncwarp", mask, nullptr, nullptr, site);
  emulator::observe(order);
}

template <class T>
static T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_HERE) {
  return emulator::shuffle("__shfl_sync", mask, value, emulator::segment(width) | (lane & (width - 1)), site);
}
template <class T>
static T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current->lane, source = lane ^ lane_mask;
  const bool inside = source < emulator::segment(width) + width;
  return emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, site);
}
template <class T>
static T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current->lane, source = lane + static_cast<int>(delta);
  const bool inside = source < emulator::segment(width) + width;
  return emulator::shuffle("__shfl_down_sync", mask, value, inside ? source : lane, site);
}
template <class T>
static T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current->lane, source = lane - static_cast<int>(delta);
  return emulator::shuffle("__shfl_up_sync", mask, value, source >= emulator::segment(width) ? source : lane, site);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_HERE) {
  return emulator::ballot("__ballot_sync", mask, predicate, site);
}
static inline int __any_sync(unsigned mask, int predicate, EMULATOR_HERE) {
  return emulator::ballot("__any_sync", mask, predicate, site) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, EMULATOR_HERE) {
  return emulator::ballot("__all_sync", mask, !predicate, site) == 0;
}
static inline unsigned __activemask() { return emulator::block.warps[emulator::current->warp].alive; }

template <class T>
static unsigned __match_any_sync(unsigned mask, T value, EMULATOR_HERE) {
  const auto values = emulator::exchange<T>("__match_any_sync", mask, value, site);
  unsigned same = 0;
  for (int lane = 0; lane < emulator::WARP; ++lane)
    same |= unsigned(values.lanes >> lane & 1 && values.all[lane] == value) << lane;
  return same;
}

#define EMULATOR_REDUCE(NAME, JOIN)                                                                  \
  template <class T>                                                                                 \
  static T NAME(unsigned mask, T value, EMULATOR_HERE) {                                             \
    return emulator::reduce(#NAME, mask, value, site, [](T a, T b) -> T { return JOIN; });           \
  }
EMULATOR_REDUCE(__reduce_add_sync, a + b)
EMULATOR_REDUCE(__reduce_min_sync, a < b ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, a < b ? b : a)
EMULATOR_REDUCE(__reduce_and_sync, a& b)
EMULATOR_REDUCE(__reduce_or_sync, a | b)
EMULATOR_REDUCE(__reduce_xor_sync, a ^ b)
#undef EMULATOR_REDUCE
