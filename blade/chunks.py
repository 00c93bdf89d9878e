"""Long rows of short operations over big tensors: chunk by chunk, on all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat

import torch
from torch import Tensor

DEVICE_CHUNK = 1 << 25  # numbers of the first tensor


def in_chunks(work: Callable[..., None], step: int, *tensors: Tensor) -> None:
    """Call work(*chunks) for every `step` rows of the tensors, which have the same number of rows, on as many threads
    as torch has.

    A chunk that stays in cache goes through all of work's operations there. Torch's own threads would meet at a barrier
    after each of those, and wait for each other thirty times as long as the work takes where cores are busy; so rows
    are shared out once, to threads of which each works alone. On a device chunks are large instead: it has threads
    enough, and every operation is a launch.
    """
    num_rows = len(tensors[0])
    if not tensors[0].is_cpu:
        _each(work, max(step, DEVICE_CHUNK * num_rows // max(1, tensors[0].numel())), *tensors)
        return
    with _one_thread() as num_threads:
        if num_rows < 2 * step or num_threads == 1:
            _each(work, step, *tensors)
            return
        share = -(-num_rows // num_threads)
        shares = [tensor.split_with_sizes(_sizes(num_rows, share)) for tensor in tensors]
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(_each, repeat(work), repeat(step), *shares))


def _each(work: Callable[..., None], step: int, *tensors: Tensor) -> None:
    for chunks in zip(*(tensor.split_with_sizes(_sizes(len(tensor), step)) for tensor in tensors), strict=True):
        work(*chunks)


def _sizes(num_rows: int, step: int) -> list[int]:
    return [min(step, num_rows - start) for start in range(0, num_rows, step)]


@contextmanager
def _one_thread() -> Iterator[int]:
    """Have torch work on one thread for a while; gives how many it had."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield num_threads
    finally:
        torch.set_num_threads(num_threads)
