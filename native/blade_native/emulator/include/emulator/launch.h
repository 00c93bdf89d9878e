// Run all blocks of a launch; the C functions that Python calls.
#pragma once
#include "emulator/barrier.h"
#include "emulator/traps.h"
#include "emulator/warp.h"

namespace emulator {

constexpr int MAX_PARAMETERS = 64;

struct Kernel {
  const char* name;
  void (*entry)(void** arguments);
  int num_parameters;
  int sizes[MAX_PARAMETERS];
  char kinds[MAX_PARAMETERS];
  Kernel* next;
};
inline Kernel* kernels = nullptr;

// p pointer, b bool, f floating point, u and i integer, s struct.
template <class T>
constexpr char kind_of() {
  if (std::is_pointer_v<T>) return 'p';
  if (std::is_same_v<T, bool>) return 'b';
  if (std::is_floating_point_v<T>) return 'f';
  if (std::is_integral_v<T>) return std::is_unsigned_v<T> ? 'u' : 'i';
  return 's';
}

template <class T>
static T argument(const void* bytes) {
  alignas(T) unsigned char aligned[sizeof(T)];
  memcpy(aligned, bytes, sizeof(T));
  return *reinterpret_cast<T*>(aligned);
}

template <auto FUNCTION>
struct Entry;
template <class... A, void (*FUNCTION)(A...)>
struct Entry<FUNCTION> {
  template <size_t... I>
  static void spread(void** arguments, std::index_sequence<I...>) {
    FUNCTION(argument<std::remove_cv_t<A>>(arguments[I])...);
  }
  static void run(void** arguments) { spread(arguments, std::index_sequence_for<A...>{}); }
  static Kernel describe(const char* name) {
    return {name, &run, sizeof...(A), {int(sizeof(A))...}, {kind_of<std::remove_cv_t<A>>()...}, nullptr};
  }
};

struct Registration {
  Kernel kernel;
  explicit Registration(const Kernel& described) : kernel(described) {
    kernel.next = kernels;
    kernels = &kernel;
  }
};

static inline const Kernel* find(const char* name) {
  const Kernel* kernel = kernels;
  while (kernel && strcmp(kernel->name, name)) kernel = kernel->next;
  return kernel;
}

struct Region {  // a variable in static shared memory
  void* address;
  size_t bytes;
};

struct Launch {
  const Kernel* kernel;
  void** arguments;
  const Region* regions;
  size_t num_regions;
};
inline Launch launch;

EMULATOR_CORE static void thread_main() {
  arrived_on_stack();
  observe(&block.order);
  launch.kernel->entry(launch.arguments);
  if (current->copies.count) fail("returned with %d cp.async not waited for", current->copies.count);
  publish(&block.order);
  current->state = State::DONE;
  --block.num_alive;
  if (block.num_alive && block.num_at_barrier == block.num_alive) release_barrier();
  leave_warp();
  run_next();
  abort();  // nobody switches to a thread that is done
}

EMULATOR_CORE static void start_thread(int number) {
  Thread& thread = threads[number];
  const unsigned n = number, x = block_dimensions.x, y = block_dimensions.y;
  thread.index = uint3{n % x, n / x % y, n / x / y};
  thread.number = number;
  thread.lane = number % WARP;
  thread.warp = number / WARP;
  thread.copies.count = thread.copies.num_groups = 0;
  prepare_stack(&thread, thread_main);
  block.warps[thread.warp].alive |= 1u << thread.lane;
#if defined(__SANITIZE_THREAD__)
  if (thread.tsan_fiber) __tsan_destroy_fiber(thread.tsan_fiber);
  thread.tsan_fiber = __tsan_create_fiber(0);
  char name[96];
  const uint3 b = block_index, t = thread.index;
  snprintf(name, sizeof name, "CUDA block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
  __tsan_set_fiber_name(thread.tsan_fiber, name);
#endif
}

// Name every place where threads of the block wait for ever.
EMULATOR_CORE static void report_deadlock() {
  int length = snprintf(error, sizeof error, "block (%u,%u,%u): deadlock", block_index.x, block_index.y, block_index.z);
  bool told[MAX_THREADS] = {};
  for (int i = 0; i < block.num_threads; ++i) {
    const Thread& first = threads[i];
    if (told[i] || first.state == State::DONE) continue;
    int count = 0;
    for (int j = i; j < block.num_threads; ++j) {
      const Thread& other = threads[j];
      if (other.state != first.state || other.mask != first.mask || !(other.site == first.site)) continue;
      told[j] = true;
      ++count;
    }
    const size_t room = sizeof error - length;
    const int n = snprintf(error + length, room, "; %d threads from (%u,%u,%u) on wait in %s at %s:%d", count,
                           first.index.x, first.index.y, first.index.z, first.operation, first.site.file,
                           first.site.line);
    if (n >= int(room)) return;
    length += n;
  }
}

EMULATOR_CORE static void run_block() {
  Thread* started[MAX_THREADS];
  block.num_alive = block.num_threads;
  block.num_at_barrier = block.head = block.tail = 0;
  votes = Votes{};
  for (Warp& warp : block.warps) warp.alive = warp.waiting = 0;
  // 0xFF is NaN in every float type and -1 in the integers: shared memory that nobody wrote shows
  memset(block.shared, 0xFF, block.shared_bytes);
  for (size_t i = 0; i < launch.num_regions; ++i) memset(launch.regions[i].address, 0xFF, launch.regions[i].bytes);
  publish(&block.order);
  for (int i = 0; i < block.num_threads; ++i) {
    start_thread(i);
    started[i] = &threads[i];
  }
  make_ready(started, block.num_threads);
  run_next();  // comes back when no thread is ready
  observe(&block.order);
  if (!error[0] && block.num_alive) report_deadlock();
}

EMULATOR_CORE static void run_blocks(unsigned seed) {
  const size_t count = size_t(grid_dimensions.x) * grid_dimensions.y * grid_dimensions.z;
  auto* order = static_cast<size_t*>(malloc(count * sizeof(size_t)));
  if (!order) abort();
  for (size_t i = 0; i < count; ++i) order[i] = i;
  random_state = seed;
  permute(order, count);
  for (size_t i = 0; i < count && !error[0]; ++i) {
    const size_t n = order[i], x = grid_dimensions.x, y = grid_dimensions.y;
    block_index = uint3{unsigned(n % x), unsigned(n / x % y), unsigned(n / x / y)};
    run_block();
  }
  free(order);
}

}  // namespace emulator

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))
// One per kernel, appended to the source.
#define EMULATOR_KERNEL(NUMBER, NAME, ...) \
  static emulator::Registration emulator_registration_##NUMBER{emulator::Entry<&__VA_ARGS__>::describe(NAME)};

// Number, sizes and kinds of a kernel's parameters; 1 when there is no such kernel.
EMULATOR_EXPORT int emulator_info(const char* name, int* count, int* sizes, char* kinds) {
  const emulator::Kernel* kernel = emulator::find(name);
  if (!kernel) return 1;
  *count = kernel->num_parameters;
  memcpy(sizes, kernel->sizes, sizeof kernel->sizes);
  memcpy(kinds, kernel->kinds, sizeof kernel->kinds);
  return 0;
}

// An address inside this library, by which Python finds where it was loaded.
EMULATOR_EXPORT void* emulator_anchor() { return reinterpret_cast<void*>(&emulator_info); }

// Run a launch to its end. Returns nullptr, or what went wrong. Not reentrant.
EMULATOR_EXPORT EMULATOR_CORE const char* emulator_launch(const char* name, const unsigned* grid,
                                                           const unsigned* dimensions, size_t shared_bytes,
                                                           void** arguments, unsigned seed, double seconds,
                                                           const emulator::Region* regions, size_t num_regions) {
  using namespace emulator;
  launch = {find(name), arguments, regions, num_regions};
  grid_dimensions = dim3(grid[0], grid[1], grid[2]);
  block_dimensions = dim3(dimensions[0], dimensions[1], dimensions[2]);
  block.num_threads = int(dimensions[0] * dimensions[1] * dimensions[2]);
  error[0] = 0;
  block.shared_bytes = shared_bytes;
  const size_t allocated = (shared_bytes + 128) / 128 * 128;
  block.shared = static_cast<unsigned char*>(aligned_alloc(128, allocated));
  if (!block.shared) abort();
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared + shared_bytes, allocated - shared_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  host.tsan_fiber = __tsan_get_current_fiber();
#endif
  {
    const Traps traps(seconds);
    run_blocks(seed);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared, allocated);
#endif
  free(block.shared);
  block.shared = nullptr;
  return error[0] ? error : nullptr;
}
