"""Compile and launch the CUDA sources through CuPy, on torch's tensors and torch's current stream.

The cupy module is an argument, so that the emulator's double (`blade_native.emulator`) takes its place unnoticed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blade import ConfigError
from blade_native.cuda import source

SOURCES = Path(__file__).parent
OPTIONS = ("-std=c++17",)
DEFAULT_SHARED_BYTES = 48 << 10  # what a launch may ask for without opting in
DTYPES = {
    "float": torch.float32, "__half": torch.float16, "__nv_bfloat16": torch.bfloat16, "int": torch.int32,
    "long long": torch.int64, "signed char": torch.int8, "unsigned char": torch.uint8, "bool": torch.bool,
    "__nv_fp8_e4m3": torch.float8_e4m3fn, "__nv_fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
CUDA_NAMES = {dtype: name for name, dtype in DTYPES.items()}  # torch.bfloat16 -> "__nv_bfloat16"
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
        """The kernel of one of the module's expressions, with so much dynamic shared memory in every launch.

        Compiles where that has not been done: call it while loading, never inside a step."""
        function = self._raw.get_function(expression)
        if shared_bytes > DEFAULT_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = shared_bytes
        name, arguments = source.template_arguments(expression)
        kernel = self._kernels[name]
        types = {**DTYPES, **dict.fromkeys(kernel.parameters)}
        types.update({key: DTYPES.get(value) for key, value in zip(kernel.parameters, arguments, strict=False)})
        return Kernel(self._launcher, function, kernel, types, shared_bytes)


class Kernel:
    """kernel(grid, block, field=value, ...) launches; the fields are those of the kernel's argument struct."""

    def __init__(
        self,
        launcher: Launcher,
        function: Any,
        declared: source.Signature,
        types: dict[str, torch.dtype | None],
        shared_bytes: int,
    ) -> None:
        self.name = declared.name
        self.shared_bytes = shared_bytes
        self._launcher, self._function = launcher, function
        self._layout = declared.layout()
        self._struct = packer(self._layout)
        self._fields = [
            (field.name, self._pointer(field, types.get(field.element)) if field.element else _as_is)
            for field in declared.fields
        ]

    def __call__(self, grid: Dims, block: Dims, /, **values: Any) -> None:
        """Tensors for pointers (None: a null pointer), Python numbers for scalars. Raises TypeError for a missing or
        unknown field, a tensor on another device or of another dtype, and a number that does not fit."""
        if len(values) != len(self._fields):
            raise TypeError(f"{self.name} takes {[name for name, _ in self._fields]}, not {list(values)}")
        try:
            packed = self._struct.pack(*[convert(values[name]) for name, convert in self._fields])
        except (KeyError, struct.error) as error:
            raise TypeError(f"{self.name}: {error} in {values}") from error
        arguments = np.frombuffer(packed, self._layout)
        self._function(grid, block, (arguments,), shared_mem=self.shared_bytes, stream=self._launcher.stream())

    def _pointer(self, field: source.Field, dtype: torch.dtype | None) -> Callable[[Any], int]:
        device = self._launcher.device

        def address(tensor: Any) -> int:
            if tensor is None:
                return 0
            if tensor.device != device or (dtype is not None and tensor.dtype != dtype):
                wanted = f"{dtype or 'a tensor'} on {device}"
                raise TypeError(f"{self.name}: {field.name} is {tensor.dtype} on {tensor.device}, not {wanted}")
            return int(tensor.data_ptr())

        return address


def _as_is(value: Any) -> Any:
    return value


CODES = {"i4": "i", "u4": "I", "i8": "q", "u8": "Q", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "u1": "B"}


def packer(layout: np.dtype[np.void]) -> struct.Struct:
    """The layout as a Struct, which packs a launch's arguments ten times as fast as numpy."""
    text, end = "<", 0
    for name in layout.names or ():
        dtype, offset = layout.fields[name][:2]  # type: ignore[index]
        text += f"{offset - end}x{CODES[dtype.str[1:]]}"
        end = offset + dtype.itemsize
    return struct.Struct(f"{text}{layout.itemsize - end}x")
