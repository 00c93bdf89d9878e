"""What the machine gives: no decode reads its weights faster than the memory, no prompt's GEMM multiplies faster than
the arithmetic units."""

from __future__ import annotations

import time
from collections.abc import Callable

from blade_native.host import last_level_cache
from blade_native.simd.library import Library
from blade_native.simd.memory import allocate

LEAST_BYTES, MOST_BYTES = 256 << 20, 1 << 30
BLOCK = 64 << 10  # bytes: of what is read, a multiple
ZEROS = 8192  # bytes
STEPS = 100_000  # some milliseconds
SECONDS = 0.3


def uncached_bytes() -> int:
    """How much to read in turn so that the caches, shared ones of a large processor too, hold little of it."""
    return min(max(LEAST_BYTES, 2 * last_level_cache()), MOST_BYTES)


def read_bandwidth(library: Library, threads: int, seconds: float = SECONDS, num_bytes: int | None = None) -> float:
    """Bytes per second of all threads reading memory on huge pages: the best of some passes. With `num_bytes` of so
    many, which caches may hold; else of more than they do."""
    num_bytes = min(uncached_bytes(), max(BLOCK, num_bytes // BLOCK * BLOCK)) if num_bytes else uncached_bytes()
    data = allocate(num_bytes).zero_()
    return _best_rate(lambda: num_bytes if library.read(data.data_ptr(), num_bytes, threads) == 0 else -1, seconds)


def peak_flops(library: Library, bits: int, threads: int, seconds: float = SECONDS) -> float:
    """Operations per second, a product and its sum being two, of all threads on registers: of floats of 32 or 16
    `bits`, or of integers of 8, each by the instructions that the level's linears use for them."""
    zeros = allocate(ZEROS).zero_()
    return 2 * _best_rate(lambda: library.multiply(zeros.data_ptr(), bits, STEPS, threads), seconds)


def _best_rate(run: Callable[[], int], seconds: float) -> float:
    """Of what `run` says it has done, per second."""
    best, end = 0.0, time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        done = run()
        best = max(best, done / (time.perf_counter() - started))
    return best
