"""A double of cupy's RawKernel, stricter than cupy: the driver checks neither the number nor the size of arguments, the
double does both, and their kinds."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from blade_native.emulator import build

if TYPE_CHECKING:
    from blade_native.emulator.cupy_double import CupyDouble

MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_SHARED = 227 << 10  # sm_90's; the opt-in of other devices is smaller, see nvrtc.py
DEFAULT_SHARED = 48 << 10


class CUDADriverError(RuntimeError):
    """What the driver would refuse."""


class EmulatorError(RuntimeError):
    """A kernel did what no device allows, or what hangs one: it names block, thread and line."""


@dataclass(frozen=True)
class Launch:
    """A launch with its argument bytes frozen, as a CUDA graph holds them."""

    kernel: RawKernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[bytes, ...]
    shared_bytes: int
    stream: int

    def run(self) -> None:
        self.kernel.run(self)


class RawKernel:
    def __init__(self, cupy: CupyDouble, name: str, library: build.Library, lock: threading.Lock) -> None:
        self.cupy, self.name, self._library, self._lock = cupy, name, library, lock
        self._max_shared = DEFAULT_SHARED
        parameters = library.parameters(name)
        if parameters is None:
            raise CUDADriverError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        self.parameters = parameters

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._max_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if not 0 <= size <= MAX_SHARED:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {size} bytes of shared memory, a block has {MAX_SHARED}")
        self._max_shared = size

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0,
        stream: Any = None,
    ) -> None:  # fmt: skip
        if stream is None:
            raise TypeError(f"{self.name}: without a stream cupy takes its own current one, which is not torch's")
        launch = Launch(
            self,
            dims("grid", grid, MAX_GRID),
            dims("block", block, MAX_BLOCK),
            self._checked(args),
            shared_mem,
            stream.ptr,
        )
        if launch.block[0] * launch.block[1] * launch.block[2] > MAX_THREADS:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {self.name}: block {block} has too many threads")
        if shared_mem > self._max_shared:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: {shared_mem} bytes of dynamic shared memory, "
                f"max_dynamic_shared_size_bytes is {self._max_shared}"
            )
        self.cupy.launches.append(launch)
        if self.cupy.capture is not None:
            self.cupy.capture.append(launch)
        else:
            launch.run()

    def _checked(self, args: tuple[Any, ...]) -> tuple[bytes, ...]:
        packed = [pack(value) for value in args]
        if len(packed) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(packed)}")
        for i, ((data, kind), (size, wanted)) in enumerate(zip(packed, self.parameters, strict=True)):
            same = kind == wanted or {kind, wanted} <= {"i", "u"} or (wanted == "p" and kind in "iu") or wanted == "s"
            if len(data) != size or not same:
                raise TypeError(
                    f"{self.name}: argument {i} has {len(data)} bytes of kind {kind}, not {size} bytes of kind {wanted}"
                )
        return tuple(data for data, _ in packed)

    def run(self, launch: Launch) -> None:
        blobs = [ctypes.create_string_buffer(data, len(data)) for data in launch.arguments]
        arguments = (ctypes.c_void_p * max(1, len(blobs)))(*map(ctypes.addressof, blobs))
        grid, block, regions = (
            (ctypes.c_uint * 3)(*launch.grid),
            (ctypes.c_uint * 3)(*launch.block),
            self._library.regions,
        )
        with self._lock:
            report = self._library.launch(
                self.name.encode(), grid, block, launch.shared_bytes, arguments, self.cupy.seed,
                self.cupy.time_limit_s, regions, len(regions),
            )  # fmt: skip
        if report is not None:
            raise EmulatorError(f"{self.name}: {build.with_source_lines(report.decode())}")


def dims(what: str, given: tuple[int, ...], limits: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, z = (*given, 1, 1)[:3]
    if len(given) > 3 or not all(1 <= value <= limit for value, limit in zip((x, y, z), limits, strict=True)):
        raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {what} {given}")
    return x, y, z


def pack(value: Any) -> tuple[bytes, str]:
    """An argument's bytes and kind as cupy passes it: Python's int and float as 64 bits, numpy's scalars as they are,
    an array of one element by value."""
    if value is None:
        return bytes(8), "p"
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise TypeError(f"a numpy.ndarray of shape {value.shape} is no kernel parameter")
        return value.tobytes(), "s"
    if isinstance(value, np.generic):
        return value.tobytes(), value.dtype.kind
    if isinstance(value, bool):
        return bytes([value]), "b"
    if isinstance(value, int):
        return (value & (2**64 - 1)).to_bytes(8, "little"), "i"
    if isinstance(value, float):
        return np.float64(value).tobytes(), "f"
    raise TypeError(f"Unsupported type {type(value)}")
