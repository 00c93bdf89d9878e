"""Activations of captured steps laid into shared memory: two buffers that are never needed at once may overlap."""

from __future__ import annotations

import ctypes
from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from blade_native.simd.memory import allocate

ALIGNMENT = 64  # bytes: a cache line
SMALLEST = 1 << 20  # bytes of an arena


@dataclass(slots=True)
class Use:
    """A pointer among the arguments of call number `index`."""

    index: int
    call: ctypes.Structure
    field: str
    address: int | None


@dataclass(slots=True)
class Buffer:
    """One allocation of the captured pass."""

    address: int
    size: int  # bytes
    uses: list[Use] = field(default_factory=list)
    until: float = -1  # number of the last call that touches it
    offset: int = 0  # in the arena

    @property
    def since(self) -> int:
        return self.uses[0].index

    @property
    def end(self) -> int:
        return self.offset + -(-self.size // ALIGNMENT) * ALIGNMENT


class Arenas:
    """Memory that all captures of a model share, for only one of them runs at a time. Sizes are powers of two, so that
    all arenas together take at most twice what the largest capture needs."""

    def __init__(self) -> None:
        self._arenas: list[Tensor] = []

    def place(self, buffers: Iterable[Buffer], uses: Iterable[Use], result: Tensor) -> Tensor | None:
        """Point the uses that lie in one of the buffers into an arena; give `result`'s place in it, a tensor alike, or
        None, and do nothing, where it is in no buffer that a call uses."""
        used = assign(buffers, uses)
        kept = find(used, result.data_ptr())
        if kept is None:
            return None
        kept.until = inf
        arena = self._at_least(pack(used))
        for buffer in used:
            for use in buffer.uses:
                address = arena.data_ptr() + buffer.offset + (use.address or 0) - buffer.address
                setattr(use.call, use.field, address)
        start = kept.offset + result.data_ptr() - kept.address
        placed = arena[start : start + kept.address + kept.size - result.data_ptr()].view(result.dtype)
        return torch.as_strided(placed, result.shape, result.stride())

    def _at_least(self, num_bytes: int) -> Tensor:
        for arena in self._arenas:
            if len(arena) >= num_bytes:
                return arena
        self._arenas.append(allocate(max(SMALLEST, 1 << (num_bytes - 1).bit_length())))
        return self._arenas[-1]


def assign(buffers: Iterable[Buffer], uses: Iterable[Use]) -> list[Buffer]:
    """Give each buffer its uses, in order; those that have any, by address."""
    by_address = sorted((buffer for buffer in buffers if buffer.size), key=lambda buffer: buffer.address)
    for use in uses:
        buffer = find(by_address, use.address)
        if buffer is not None:
            buffer.uses.append(use)
            buffer.until = use.index
    return [buffer for buffer in by_address if buffer.uses]


def find(by_address: list[Buffer], address: int | None) -> Buffer | None:
    """The buffer an address lies in."""
    if address is None:
        return None
    at = bisect_right(by_address, address, key=lambda buffer: buffer.address) - 1
    inside = at >= 0 and address < by_address[at].address + by_address[at].size
    return by_address[at] if inside else None


def pack(buffers: Iterable[Buffer]) -> int:
    """Lay them out by first fit in the order of their first use; gives the bytes of the whole."""
    needed: list[Buffer] = []  # still, by offset
    total = 0
    for buffer in sorted(buffers, key=lambda buffer: buffer.since):
        needed = [other for other in needed if other.until >= buffer.since]
        for other in needed:
            if buffer.offset < other.end and other.offset < buffer.end:
                buffer.offset = other.end
        insort(needed, buffer, key=lambda buffer: buffer.offset)
        total = max(total, buffer.end)
    return total
