// cp.async. The target is poisoned when the copy starts and filled when it is waited for, so that both a missing wait
// and a copy started while its target is still read give a wrong result.
#pragma once
#include "emulator/schedule.h"

namespace emulator {

static inline void require_aligned(const void* address, size_t bytes, const char* operation, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("%s at %s:%d: %p is not aligned to %zu bytes", operation, site.file, site.line, address, bytes);
}

static inline void cp_async(void* target, const void* source, int bytes, int valid_bytes, Site site) {
  require_aligned(target, bytes, "cp.async to shared memory", site);
  if (valid_bytes) require_aligned(source, bytes, "cp.async from global memory", site);
  AsyncCopies& copies = current->copies;
  if (copies.count == AsyncCopies::CAPACITY)
    fail("cp.async at %s:%d: more than %d of one thread under way", site.file, site.line, AsyncCopies::CAPACITY);
  memset(target, 0xFF, bytes);
  copies.items[copies.count++] = {target, source, bytes, valid_bytes};
}

static inline void cp_commit(Site site) {
  AsyncCopies& copies = current->copies;
  if (copies.num_groups == AsyncCopies::MAX_GROUPS)
    fail("cp.async at %s:%d: more than %d groups without a wait", site.file, site.line, AsyncCopies::MAX_GROUPS);
  copies.groups[copies.num_groups++] = copies.count;
}

// Carry out all copies but those of the youngest `pending` groups and those not yet committed.
static inline void cp_wait(int pending) {
  AsyncCopies& copies = current->copies;
  const int done_groups = copies.num_groups - pending;
  if (done_groups <= 0) return;
  const int done = copies.groups[done_groups - 1];
  for (int i = 0; i < done; ++i) {
    const AsyncCopy& copy = copies.items[i];
    memcpy(copy.target, copy.source, copy.valid_bytes);
    memset(static_cast<char*>(copy.target) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
  }
  for (int i = done; i < copies.count; ++i) copies.items[i - done] = copies.items[i];
  for (int i = done_groups; i < copies.num_groups; ++i) copies.groups[i - done_groups] = copies.groups[i] - done;
  copies.count -= done;
  copies.num_groups = pending;
}

}  // namespace emulator
