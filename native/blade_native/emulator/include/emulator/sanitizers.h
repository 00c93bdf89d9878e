// What a change of stack has to tell the sanitizers, and the order that barriers create for ThreadSanitizer.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
// The emulator's own bookkeeping is no part of the program under test.
#define EMULATOR_CORE __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATOR_CORE __attribute__((noinline))
#endif

namespace emulator {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool HAS_OWN_TRAPS = true;  // their reports say more than ours
constexpr size_t STACK_BYTES = 512 << 10;
#else
constexpr bool HAS_OWN_TRAPS = false;
constexpr size_t STACK_BYTES = 128 << 10;
#endif

// All that a thread did before `publish(p)` is ordered before what another one does after a later `observe(p)`.
static inline void publish([[maybe_unused]] void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(p);
#endif
}
static inline void observe([[maybe_unused]] void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(p);
#endif
}

}  // namespace emulator
