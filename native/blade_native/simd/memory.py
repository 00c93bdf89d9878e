"""Large buffers on huge pages: weights and KV are streamed, and 4 KiB pages cost a tenth of the bandwidth."""

from __future__ import annotations

import ctypes
import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes
LINE = 64  # bytes
REGION = 16 * HUGE_PAGE  # bytes; what is not used of one is never touched


def allocate(num_bytes: int) -> Tensor:
    """A zeroed uint8 tensor, aligned to huge pages and advised to use them where it is large enough to matter."""
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(region)) % HUGE_PAGE
    region.madvise(mmap.MADV_HUGEPAGE, offset, num_bytes)
    return torch.frombuffer(region, dtype=torch.uint8, count=num_bytes, offset=offset)  # keeps the region alive


class Regions:
    """Buffers side by side on huge pages, the small ones too: for a model's weights, which all live as long as it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def allocate(self, num_bytes: int) -> Tensor:
        """Zeroed uint8, aligned to cache lines."""
        if num_bytes >= REGION // 2:
            return allocate(num_bytes)
        with self._lock:
            if num_bytes > len(self._rest):
                self._rest = allocate(REGION)
            buffer, self._rest = self._rest[:num_bytes], self._rest[-(-num_bytes // LINE) * LINE :]
        return buffer
