"""A double of the part of cupy that compiles and launches kernels, see kernel_double.py for the kernels themselves."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from blade_native.emulator import build
from blade_native.emulator.kernel_double import Launch, RawKernel

EXTERN_C = re.compile(r'extern\s+"C"\s+__global__\s+\w+\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(')


class CupyDouble:
    """Takes the place of the cupy module.

    `launches` lists all launches. While `capture` is a list they are appended to it instead of run, like under graph
    capture.
    """

    __version__ = "14.2.0"

    def __init__(self, sanitize: str = "", seed: int = 0) -> None:
        self.sanitize, self.seed = sanitize, seed
        self.time_limit_s = 60.0  # of CPU time per launch
        self.launches: list[Launch] = []
        self.capture: list[Launch] | None = None
        self.pool = ThreadPoolExecutor(2)  # g++ runs beside the caller
        self.cuda = SimpleNamespace(Stream=Stream, ExternalStream=Stream, Device=Device, is_available=lambda: False)

    def RawModule(  # noqa: N802
        self, *, code: str, options: Sequence[str] = (), name_expressions: Sequence[str] | None = None
    ) -> RawModule:
        return RawModule(self, code, tuple(options), name_expressions)

    def RawKernel(self, code: str, name: str, options: Sequence[str] = ()) -> RawKernel:  # noqa: N802
        return RawModule(self, code, tuple(options), [name]).get_function(name)


class Stream:
    """Launches run at once: a stream has nothing but its handle."""

    def __init__(self, ptr: int = 0) -> None:
        self.ptr = ptr

    @classmethod
    def from_external(cls, stream: Any) -> Stream:
        version, handle = stream.__cuda_stream__()
        if version != 0:
            raise ValueError(f"unknown version {version} of the stream protocol")
        return cls(handle)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def synchronize(self) -> None: ...


class Device:
    """An H100, as far as a launch asks."""

    compute_capability = "90"

    def __init__(self, device: int = 0) -> None:
        self.id = device

    def synchronize(self) -> None: ...


class RawModule:
    """Starts compiling at once, in a thread; a compiler's error is raised by compile() and get_function()."""

    def __init__(self, cupy: CupyDouble, code: str, options: tuple[str, ...], names: Sequence[str] | None) -> None:
        self.cupy = cupy
        found = tuple(EXTERN_C.findall(code)) if names is None else tuple(names)
        self._built = cupy.pool.submit(build.build, code, found, options, cupy.sanitize)
        self._lock = threading.Lock()

    def compile(self) -> None:
        self._built.result()

    @cached_property
    def _library(self) -> build.Library:
        return build.Library(self._built.result())

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self.cupy, name, self._library, self._lock)
