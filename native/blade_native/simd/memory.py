"""Large buffers on huge pages: weights and KV are streamed, and 4 KiB pages cost a tenth of the bandwidth."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes


def allocate(num_bytes: int) -> Tensor:
    """A zeroed uint8 tensor, aligned to huge pages and advised to use them where it is large enough to matter."""
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(region)) % HUGE_PAGE
    region.madvise(mmap.MADV_HUGEPAGE, offset, num_bytes)
    return torch.frombuffer(region, dtype=torch.uint8, count=num_bytes, offset=offset)  # keeps the region alive
