// A CUDA thread as a fiber: its stack, what it waits for, and the switch from one to another.
#pragma once
#include <sys/mman.h>

#include "emulator/sanitizers.h"

namespace emulator {

constexpr int MAX_THREADS = 1024;  // of a block
constexpr int WARP = 32;

// A place in the source under test.
struct Site {
  const char* file = "";
  int line = 0;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && !strcmp(file, other.file); }
};

struct AsyncCopy {
  void* target;
  const void* source;
  int bytes, valid_bytes;
};

// cp.async of one thread, in the order of their issue; groups[i] is where the i-th committed group ends.
struct AsyncCopies {
  static constexpr int CAPACITY = 256, MAX_GROUPS = 32;
  AsyncCopy items[CAPACITY];
  int groups[MAX_GROUPS];
  int count = 0, num_groups = 0;
};

using Combine = void (*)(void** operands, unsigned lanes);
enum class State { READY, AT_BARRIER, IN_COLLECTIVE, DONE };

struct Thread {
  uint3 index{};  // threadIdx
  int number = 0, lane = 0, warp = 0;
  State state = State::DONE;
  // while it waits
  Site site;
  const char* operation = "";
  unsigned mask = 0;
  void* operand = nullptr;
  Combine combine = nullptr;

  AsyncCopies copies;
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // STACK_BYTES, the lowest page is a guard
  void* tsan_fiber = nullptr;
  void* asan_fake_stack = nullptr;
};

inline Thread threads[MAX_THREADS];
inline Thread host;                // the launching thread, outside of all blocks
inline Thread* current = &host;    // whose code runs
inline const void* host_stack = nullptr;  // as AddressSanitizer knows it
inline size_t host_stack_bytes = 0;

// Save the callee-saved registers and the stack pointer to *save, and continue where `load` was saved.
extern "C" void blade_emulator_switch(void** save, void* load);
asm(R"(
  .text
  .p2align 4
  .local blade_emulator_switch
  .type blade_emulator_switch, @function
blade_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size blade_emulator_switch, .-blade_emulator_switch
)");

EMULATOR_CORE static void switch_to(Thread* next) {
  [[maybe_unused]] Thread* const self = current;
  current = next;
#if defined(__SANITIZE_ADDRESS__)
  const bool to_host = next == &host, ends = self != &host && self->state == State::DONE;
  __sanitizer_start_switch_fiber(ends ? nullptr : &self->asan_fake_stack, to_host ? host_stack : next->stack,
                                 to_host ? host_stack_bytes : STACK_BYTES);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(next->tsan_fiber, 1);  // 1: a switch orders nothing
#endif
  blade_emulator_switch(&self->stack_pointer, next->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->asan_fake_stack, nullptr, nullptr);
#endif
}

// Give the thread a stack on which `entry` starts when it is switched to.
EMULATOR_CORE static void prepare_stack(Thread* thread, void (*entry)()) {
  if (!thread->stack) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE)) abort();
    thread->stack = static_cast<char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread->stack + 4096, STACK_BYTES - 4096);
  thread->asan_fake_stack = nullptr;
#endif
  void** top = reinterpret_cast<void**>(thread->stack + STACK_BYTES - 64);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;  // the registers that the switch pops
  memset(top, 0, 6 * sizeof(void*));
  thread->stack_pointer = top;
}

// On a new stack, before anything else.
EMULATOR_CORE static void arrived_on_stack() {
#if defined(__SANITIZE_ADDRESS__)
  if (host_stack)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  else
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
}

}  // namespace emulator
