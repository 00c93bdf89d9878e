"""Load the compiled kernels and declare their C ABI."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p

from blade import ConfigError
from blade_native.simd import build

MACHINE_LEVELS = ("portable", "avx2", "avx512", "avx512bf16")  # as blade_machine_level counts them


class Unavailable(ConfigError):
    """The compiled kernels are missing or stale; the torch op set serves instead."""


class CFormat(ctypes.Structure):
    """`Format` of api.h."""

    _fields_ = (
        ("bits", c_int32),
        ("group", c_int32),
        ("scales", c_int32),
        ("offsets", c_int32),
        ("block", c_int64),
    )


class CLinear(ctypes.Structure):
    """`Linear` of api.h."""

    _fields_ = (("format", CFormat), ("n", c_int64), ("k", c_int64), ("weights", c_void_p), ("bias", c_void_p))


class CLinearCall(ctypes.Structure):
    """`LinearCall` of api.h."""

    _fields_ = (
        ("linear", POINTER(CLinear)),
        ("x", c_void_p),
        ("x_dtype", c_int32),
        ("m", c_int64),
        ("y", c_void_p),
        ("y_dtype", c_int32),
        ("y_stride", c_int64),
        ("threads", c_int32),
    )


class CGrouped(ctypes.Structure):
    """`Grouped` of api.h."""

    _fields_ = tuple((name, c_void_p) for name in ("q", "scales", "offsets", "block_scales", "block_offsets"))


class CPagedKV(ctypes.Structure):
    """`PagedKV` of api.h."""

    _fields_ = (
        ("dtype", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("k", c_void_p),
        ("v", c_void_p),
    )


PTR, INT, LONG = c_void_p, c_int, c_int64
LINEAR, KV = POINTER(CLinear), POINTER(CPagedKV)
PROTOTYPES = {
    "linear": (POINTER(CLinearCall),),
    "pack_dense": (LINEAR, PTR, INT),
    "pack_grouped": (LINEAR, POINTER(CGrouped), INT),
    "unpack_rows": (LINEAR, PTR, LONG, PTR, INT, INT),
    "rms_norm": (INT, PTR, LONG, LONG, LONG, LONG, PTR, c_float, PTR, INT),
    "add_rms_norm": (INT, PTR, PTR, LONG, LONG, PTR, c_float, PTR, INT),
    "silu_mul": (INT, PTR, LONG, LONG, PTR, INT),
    "rope_and_store": (KV, PTR, PTR, PTR, LONG, LONG, LONG, LONG, PTR, PTR, PTR, LONG, PTR, PTR, INT),
    "attend": (KV, PTR, LONG, LONG, PTR, PTR, PTR, LONG, c_float, LONG, PTR, INT),
    "argmax": (PTR, LONG, LONG, PTR, INT),
    "top_k": (PTR, LONG, LONG, LONG, PTR, PTR, INT),
    "read": (PTR, LONG, INT),
}
CAN_FAIL = ("linear", "attend", "top_k")  # for want of scratch memory
Kernel = Callable[..., int]


class Library:
    """The kernels of one instruction-set level. Calls release the GIL."""

    linear: Kernel
    pack_dense: Kernel
    pack_grouped: Kernel
    unpack_rows: Kernel
    rms_norm: Kernel
    add_rms_norm: Kernel
    silu_mul: Kernel
    rope_and_store: Kernel
    attend: Kernel
    argmax: Kernel
    top_k: Kernel
    read: Kernel

    def __init__(self, level: str) -> None:
        self.level = level
        self._dll = open_library(level)
        for name, argtypes in PROTOTYPES.items():
            function = getattr(self._dll, f"blade_{name}")
            function.argtypes, function.restype = argtypes, c_int
            if name in CAN_FAIL:
                function.errcheck = check_status
            setattr(self, name, function)
        self.packed_bytes = self._dll.blade_packed_bytes
        self.packed_bytes.argtypes, self.packed_bytes.restype = (LINEAR,), LONG


def check_status(status: int, function: object, arguments: object) -> int:
    if status:
        raise MemoryError("no memory for a kernel's scratch")
    return status


def open_library(level: str) -> ctypes.CDLL:
    path = build.library_path(level)
    remedy = "Build them with: python -m blade_native.simd.build"
    if not path.exists():
        raise Unavailable("The CPU kernels have not been compiled, the slower torch ops serve instead.", remedy)
    if not build.is_current(level):
        raise Unavailable("The compiled CPU kernels are older than their sources, torch ops serve instead.", remedy)
    return ctypes.CDLL(str(path))


def runnable_levels() -> list[str]:
    """Levels this machine can run, best first."""
    best = open_library("portable").blade_machine_level()
    return list(reversed(MACHINE_LEVELS[: best + 1]))


def load(environ: Mapping[str, str] = os.environ) -> Library:
    """The best library for this machine, or the one BLADE_CPU_ISA names.

    Raises Unavailable when the kernels are missing or stale, ConfigError when the machine lacks what was named.
    """
    runnable = runnable_levels()
    level = environ.get("BLADE_CPU_ISA") or runnable[0]
    if level not in runnable:
        raise ConfigError(f"BLADE_CPU_ISA={level} cannot run here.", f"This machine runs: {', '.join(runnable)}.")
    return Library(level)
