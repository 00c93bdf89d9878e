"""Compile and launch the CUDA sources through CuPy, on torch's tensors and torch's current stream.

The cupy module is an argument, so that the emulator's double (`blade_native.emulator`) takes its place unnoticed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from blade import ConfigError
from blade_native.cuda import source
from blade_native.cuda.arguments import CUDA_NAMES, Arguments

__all__ = ["CUDA_NAMES", "Kernel", "Launcher", "Module", "cache_folder", "import_cupy"]

SOURCES = Path(__file__).parent
OPTIONS = ("-std=c++17",)
DEFAULT_SHARED_BYTES = 48 << 10  # what a launch may ask for without opting in
Dims = tuple[int, ...]


def import_cupy() -> Any:
    """The cupy module. Raises ConfigError where it is missing."""
    os.environ.setdefault("CUPY_CACHE_DIR", str(cache_folder("cupy")))  # cupy creates it while it is imported
    try:
        import cupy
    except ImportError as error:
        raise ConfigError("CuPy is not installed.", "pip install 'blade-llm[cuda]'") from error
    return cupy


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/blade/name, created for this user alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blade" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


class TorchStream:
    """torch's stream under the protocol that CuPy takes foreign streams by."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class Launcher:
    """Compiles and launches on one device. With the real cupy that is a CUDA device, with the double the CPU."""

    def __init__(self, cupy: Any, device: torch.device) -> None:
        self.cupy = cupy
        self.device = torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
        self._streams: dict[int, Any] = {}

    def load(self, path: Path | str, expressions: Iterable[str], options: Iterable[str] = ()) -> Module:
        """One module of the kernels that `expressions` name: "add<float, 4>". A relative path lies beside this file."""
        text = source.inline(SOURCES / path)
        names = tuple(dict.fromkeys(expressions))
        raw = self.cupy.RawModule(code=text, options=(*OPTIONS, *options), name_expressions=names)
        return Module(self, raw, source.kernels(text))

    def stream(self) -> Any:
        """CuPy's name for torch's current stream, asked for at each launch: under capture it is another one."""
        handle = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        if handle not in self._streams:
            self._streams[handle] = self.cupy.cuda.Stream.from_external(TorchStream(handle))
        return self._streams[handle]


class Module:
    """The kernels of one source."""

    def __init__(self, launcher: Launcher, raw: Any, kernels: dict[str, source.Signature]) -> None:
        self._launcher, self._raw, self._kernels = launcher, raw, kernels

    def kernel(self, expression: str, shared_bytes: int = 0) -> Kernel:
        """The kernel of one of the module's expressions, with so much dynamic shared memory in every launch. There may
        be several of one expression, with more or less of it.

        Compiles where that has not been done: call it while loading, never inside a step."""
        function = self._raw.get_function(expression)
        if shared_bytes > max(DEFAULT_SHARED_BYTES, function.max_dynamic_shared_size_bytes):
            function.max_dynamic_shared_size_bytes = shared_bytes
        arguments = Arguments(self._kernels, expression, self._launcher.device)
        return Kernel(self._launcher, function, arguments, shared_bytes)


class Kernel:
    """kernel(grid, block, field=value, ...) launches; the fields are those of the kernel's argument struct."""

    def __init__(self, launcher: Launcher, function: Any, arguments: Arguments, shared_bytes: int) -> None:
        self.name = arguments.kernel
        self.shared_bytes = shared_bytes
        self.device = launcher.device
        self._launcher, self._function, self._arguments = launcher, function, arguments

    def __call__(self, grid: Dims, block: Dims, /, **values: Any) -> None:
        """Tensors for pointers (None: a null pointer), Python numbers for scalars. Raises TypeError, see Arguments."""
        packed = self._arguments.pack(values)
        self._function(grid, block, (packed,), shared_mem=self.shared_bytes, stream=self._launcher.stream())
