"""Large buffers on huge pages: weights and KV are streamed, and 4 KiB pages cost a tenth of the bandwidth."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes
LINE = 64  # bytes
REGION = 16 * HUGE_PAGE  # bytes; what is not used of one is never touched
TOUCHED_AT_ONCE = 4 * HUGE_PAGE  # bytes


class Region:
    """Zeroed memory, aligned to huge pages and advised to use them from `small` bytes on. Tensors in it keep it
    alive."""

    def __init__(self, num_bytes: int, small: int = 0) -> None:
        self._map = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._start = -ctypes.addressof(ctypes.c_char.from_buffer(self._map)) % HUGE_PAGE
        self.num_bytes = num_bytes
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # of a kernel without them: small pages do
                self._map.madvise(mmap.MADV_HUGEPAGE, self._start + small, num_bytes - small)

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map, self._start))

    def tensor(self, start: int, num_bytes: int) -> Tensor:
        """uint8."""
        import torch

        return torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=self._start + start)

    def release(self, start: int) -> None:
        """Give the pages from `start` on back; they would be zeros again."""
        start += -start % HUGE_PAGE
        if start < self.num_bytes:
            self._map.madvise(mmap.MADV_DONTNEED, self._start + start, self.num_bytes - start)


class Prepared:
    """A region whose pages a thread touches, the first touch being what takes time: a virtual machine may have to be
    given each of them by its host."""

    def __init__(self, num_bytes: int, touch: Callable[[int, int], int]) -> None:
        """touch(address, bytes) makes pages present without changing what is in them."""
        self._region = Region(num_bytes)
        self._touch = touch
        self._used = self._touched = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._touch_all, daemon=True)
        self._thread.start()

    def _touch_all(self) -> None:
        for start in range(0, self._region.num_bytes, TOUCHED_AT_ONCE):
            if self._stopped:
                return
            size = min(TOUCHED_AT_ONCE, self._region.num_bytes - start)
            self._touch(self._region.address + start, size)
            self._touched = start + size

    @property
    def idle_bytes(self) -> int:
        """That the system counts as taken, and that nobody uses."""
        return max(0, self._touched - self._used)

    def allocate(self, num_bytes: int) -> Tensor | None:
        """None where it does not fit."""
        if self._used + num_bytes > self._region.num_bytes:
            return None
        start, self._used = self._used, self._used + num_bytes + -num_bytes % LINE
        return self._region.tensor(start, num_bytes)

    def close(self) -> None:
        """Give back what nobody took."""
        self._stopped = True
        self._thread.join()
        self._region.release(self._used)


class Regions:
    """Buffers side by side on huge pages, the small ones too: for a model's weights, which all live as long as it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prepared: Prepared | None = None
        self._rest: Tensor | None = None

    def prepare(self, num_bytes: int, touch: Callable[[int, int], int]) -> None:
        """Begin to take so many bytes; `touch` as in Prepared."""
        self._prepared = Prepared(num_bytes, touch)

    def allocate(self, num_bytes: int) -> Tensor:
        """Zeroed uint8, aligned to cache lines."""
        with self._lock:
            buffer = self._prepared.allocate(num_bytes) if self._prepared else None
            if buffer is not None:
                return buffer
            if num_bytes >= REGION // 2:
                return Region(num_bytes).tensor(0, num_bytes)
            if self._rest is None or num_bytes > len(self._rest):
                self._rest = Region(REGION).tensor(0, REGION)
            buffer, self._rest = self._rest[:num_bytes], self._rest[-(-num_bytes // LINE) * LINE :]
            return buffer

    @property
    def idle_bytes(self) -> int:
        """That were prepared, and wait for their use or for `close`."""
        with self._lock:
            return self._prepared.idle_bytes if self._prepared else 0

    def close(self) -> None:
        """Give back what was prepared and has not been used. Harmless when done again."""
        with self._lock:
            if self._prepared:
                self._prepared.close()
            self._prepared = None


def allocate(num_bytes: int) -> Tensor:
    """A zeroed uint8 tensor for what fills up from its start, as a KV cache does: on huge pages, but for the first.
    Every layer's K and V would take one of those, 2 MiB to be zeroed, with the first token."""
    import torch

    if num_bytes <= HUGE_PAGE:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    return Region(num_bytes, small=HUGE_PAGE).tensor(0, num_bytes)
