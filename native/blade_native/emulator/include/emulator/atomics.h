// Atomic functions on global and shared memory. Relaxed, as on a device: they order nothing else.
#pragma once
#include <type_traits>

namespace emulator {

template <class T>
struct Same {  // keeps T out of deduction, so that atomicAdd(&counter, 1) takes the counter's type
  using type = T;
};

// old = *p; *p = update(old); returns old.
template <class T, class Update>
static T atomic_update(T* p, Update update) {
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  for (;;) {
    T next = update(old);
    if (__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
  }
}

}  // namespace emulator

#define EMULATOR_ATOMIC(NAME, UPDATE)                                                                    \
  template <class T>                                                                                     \
  static T NAME(T* p, typename emulator::Same<T>::type value) {                                          \
    return emulator::atomic_update(p, [&](T old) { return static_cast<T>(UPDATE); });                    \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMin, old < value ? old : value)
EMULATOR_ATOMIC(atomicMax, old < value ? value : old)
EMULATOR_ATOMIC(atomicAnd, old& value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef EMULATOR_ATOMIC

template <class T>
static T atomicCAS(T* p, typename emulator::Same<T>::type expected, typename emulator::Same<T>::type value) {
  return emulator::atomic_update(p, [&](T old) { return old == expected ? value : old; });
}
