// A kernel's memory fault, division by zero, misaligned access or endless loop ends the launch with a report, not the
// process. The signal's handler sends the fiber into `report_trap` on its own, emptied stack.
#pragma once
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "emulator/schedule.h"

namespace emulator {

struct Trap {
  int signal = 0;
  void* address = nullptr;
  void* instruction = nullptr;
};
inline Trap trap;

EMULATOR_CORE [[noreturn]] static void report_trap() {
  Dl_info library{};
  dladdr(trap.instruction, &library);
  // build.py turns library+offset into file and line
  const size_t offset = static_cast<char*>(trap.instruction) - static_cast<char*>(library.dli_fbase);
  const char* where = library.dli_fname ? library.dli_fname : "?";
  switch (trap.signal) {
    case SIGILL: fail("misaligned access, or an index outside of its array, at {%s+0x%zx}", where, offset);
    case SIGFPE: fail("integer division by zero at {%s+0x%zx}", where, offset);
    case SIGVTALRM: fail("the time limit is over: an endless loop? It was at {%s+0x%zx}", where, offset);
    default:
      if (trap.address) fail("memory fault: address %p at {%s+0x%zx}", trap.address, where, offset);
      fail("memory fault: a wild pointer at {%s+0x%zx}", where, offset);
  }
}

EMULATOR_CORE static void on_signal(int number, siginfo_t* info, void* context) {
  if (current == &host) {  // no kernel's fault
    if (number != SIGVTALRM) signal(number, SIG_DFL);
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  trap = {number, info->si_addr, reinterpret_cast<void*>(registers[REG_RIP])};
  registers[REG_RSP] = reinterpret_cast<greg_t>(current->stack + STACK_BYTES - 128 - 8);  // as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&report_trap);
}

// Handlers and a timer over the launching thread's CPU time, for the life of this object.
class Traps {
 public:
  EMULATOR_CORE explicit Traps(double seconds) {
    if (HAS_OWN_TRAPS) return;
    stack_t stack{alternate, 0, sizeof alternate};
    sigaltstack(&stack, &old_stack);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < COUNT; ++i) sigaction(SIGNALS[i], &action, &old[i]);
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
    event._sigev_un._tid = static_cast<int>(syscall(SYS_gettid));
    has_timer = !timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
    const auto whole = static_cast<time_t>(seconds);
    itimerspec limit{{0, 0}, {whole, static_cast<long>((seconds - whole) * 1e9)}};
    if (has_timer) timer_settime(timer, 0, &limit, nullptr);
  }
  EMULATOR_CORE ~Traps() {
    if (HAS_OWN_TRAPS) return;
    if (has_timer) timer_delete(timer);
    for (int i = 0; i < COUNT; ++i) sigaction(SIGNALS[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }

 private:
  static constexpr int COUNT = 5;
  static constexpr int SIGNALS[COUNT] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
  alignas(16) char alternate[64 << 10];
  struct sigaction old[COUNT]{};
  stack_t old_stack{};
  timer_t timer{};
  bool has_timer = false;
};

}  // namespace emulator
