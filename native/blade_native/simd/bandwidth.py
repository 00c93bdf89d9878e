"""What the memory gives: decoding streams the weights, and cannot be faster than this."""

from __future__ import annotations

import time

from blade_native.simd.library import Library
from blade_native.simd.memory import allocate

NUM_BYTES = 256 << 20  # beyond any cache
SECONDS = 0.3


def read_bandwidth(library: Library, threads: int, seconds: float = SECONDS) -> float:
    """Bytes per second of all threads reading memory on huge pages: the best of some passes."""
    data = allocate(NUM_BYTES).zero_()
    best, end = float("inf"), time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        library.read(data.data_ptr(), NUM_BYTES, threads)
        best = min(best, time.perf_counter() - started)
    return NUM_BYTES / best
