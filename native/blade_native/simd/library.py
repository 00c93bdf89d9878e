"""Load the compiled kernels and declare their C ABI."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Mapping
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_uint8, c_void_p
from typing import Any

from blade import ConfigError
from blade_native.simd import build
from blade_native.simd.memory import Regions

log = logging.getLogger("blade.native")

MACHINE_LEVELS = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")  # as blade_machine_level counts them


class Unavailable(ConfigError):
    """The compiled kernels are missing or stale; the torch op set serves instead."""


class CFormat(Structure):
    """`Format` of api.h."""

    _fields_ = (
        ("bits", c_int32),
        ("group", c_int32),
        ("scales", c_int32),
        ("offsets", c_int32),
        ("block", c_int64),
        ("coding", c_int32),
        ("zero", c_int32),
        ("values", c_uint8 * 16),
    )


class CLinear(Structure):
    """`Linear` of api.h."""

    _fields_ = (
        ("format", CFormat),
        ("n", c_int64),
        ("k", c_int64),
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("order", c_void_p),
    )


class CGrouped(Structure):
    """`Grouped` of api.h."""

    _fields_ = tuple((name, c_void_p) for name in ("q", "scales", "offsets", "block_scales", "block_offsets"))


class CFloat8(Structure):
    """`Float8` of api.h."""

    _fields_ = (("q", c_void_p), ("scales", c_void_p), ("block_n", c_int64), ("block_k", c_int64))


class CRounding(Structure):
    """`Rounding` of api.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("dtype", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("q", c_void_p),
        ("scales", c_void_p),
        ("minima", c_void_p),
        ("block_scales", c_void_p),
        ("block_minima", c_void_p),
        ("units", c_void_p),
        ("block", c_int32),
        ("nested", c_int32),
    )


class CKept(Structure):
    """`Kept` of api.h."""

    _fields_ = (("storage", c_int32), ("group", c_int32), ("affine", c_int32))


class CPagedKV(Structure):
    """`PagedKV` of api.h."""

    _fields_ = (
        ("dtype", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("keys", CKept),
        ("values", CKept),
        ("k", c_void_p),
        ("v", c_void_p),
        ("origins", c_void_p),
    )


class CStep(Structure):
    """`Step` of api.h."""

    _fields_ = (
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("cu_seqlens", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("ancestors", c_void_p),
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("max_blocks", c_int64),
    )


class CSlots(Structure):
    """`Slots` of api.h."""

    _fields_ = (("cu_seqlens", c_void_p), ("state_in", c_void_p), ("state_out", c_void_p), ("num_seqs", c_int64))


OUT_OF_RANGE = 2  # of `Status` of api.h
PTR, INT, LONG = c_void_p, c_int32, c_int64
LINEAR = POINTER(CLinear)
CALLS: dict[str, dict[str, Any]] = {  # the *Call structs of api.h, without the number of threads that ends each
    "linear": {"linear": PTR, "x": PTR, "x_dtype": INT, "m": LONG, "y": PTR, "y_dtype": INT, "y_stride": LONG},
    "unpack_rows": {"linear": PTR, "rows": PTR, "num_rows": LONG, "out": PTR, "dtype": INT},
    "take_rows": {"table": PTR, "rows": PTR, "num_rows": LONG, "row_bytes": LONG, "out": PTR},
    "scale_rows": {
        "dtype": INT, "x": PTR, "rows": LONG, "d": LONG, "x_stride": LONG, "factors": PTR, "at": PTR, "y": PTR,
    },
    "copy_rows": {"x": PTR, "num_rows": LONG, "row_bytes": LONG, "x_stride": LONG, "out": PTR, "out_stride": LONG},
    "add_rows": {"dtype": INT, "x": PTR, "rows": PTR, "num_rows": LONG, "d": LONG, "y": PTR},
    "rms_norm": {
        "dtype": INT, "x": PTR, "outer": LONG, "inner": LONG, "stride": LONG, "d": LONG,
        "weight": PTR, "eps": c_float, "y": PTR,
    },
    "add_rms_norm": {
        "dtype": INT, "x": PTR, "residual": PTR, "rows": LONG, "d": LONG, "weight": PTR, "eps": c_float, "y": PTR,
    },
    "silu_mul": {"dtype": INT, "gate_up": PTR, "rows": LONG, "d": LONG, "y": PTR},
    "sigmoid_mul": {
        "dtype": INT, "x": PTR, "gate": PTR, "rows": LONG, "d": LONG, "gate_width": LONG, "gate_stride": LONG,
    },
    "rope_and_store": {
        "kv": PTR, "step": PTR, "q": PTR, "k": PTR, "v": PTR, "q_stride": LONG, "k_stride": LONG, "v_stride": LONG,
        "cos_sin": PTR, "rotary_dim": LONG, "q_out": PTR, "k_out": PTR, "chunk": LONG, "farthest": LONG,
    },
    "attend": {
        "kv": PTR, "step": PTR, "q": PTR, "q_stride": LONG, "scale": c_float, "window": LONG, "out": PTR,
        "q_behind": LONG,
    },
    "argmax": {"logits": PTR, "rows": LONG, "n": LONG, "values": PTR, "ids": PTR},
    "draw": {
        "logits": PTR, "rows": LONG, "n": LONG, "temperatures": PTR, "top_k": PTR, "top_p": PTR, "min_p": PTR, "u": PTR,
        "peaks": PTR, "ids": PTR,
    },
    "logprobs": {
        "logits": PTR, "rows": LONG, "n": LONG, "k": LONG, "log_sums": PTR, "logprobs": PTR, "ids": PTR,
    },
    "short_conv": {
        "dtype": INT, "slots": PTR, "x": PTR, "x_stride": LONG, "channels": LONG, "window": LONG, "weight": PTR,
        "state": PTR, "y": PTR,
    },
    "gated_delta": {
        "dtype": INT, "slots": PTR, "q": PTR, "k": PTR, "v": PTR, "a": PTR, "b": PTR, "q_stride": LONG,
        "k_stride": LONG, "v_stride": LONG, "a_stride": LONG, "b_stride": LONG, "hk": LONG, "hv": LONG, "dk": LONG,
        "dv": LONG, "decay": PTR, "dt_bias": PTR, "state": PTR, "out": PTR,
    },
    "gated_rms_norm": {
        "dtype": INT, "x": PTR, "gate": PTR, "tokens": LONG, "heads": LONG, "d": LONG, "gate_stride": LONG,
        "weight": PTR, "eps": c_float, "y": PTR,
    },
    "experts": {
        "gate_up": PTR, "down": PTR, "num_experts": LONG, "d": LONG, "inner": LONG, "dtype": INT, "x": PTR, "m": LONG,
        "k": LONG, "ids": PTR, "weights": PTR, "y": PTR, "weigh_input": INT,
    },
    "route": {
        "dtype": INT, "logits": PTR, "rows": LONG, "n": LONG, "k": LONG, "normalize": INT, "sigmoid": INT,
        "ids": PTR, "weights": PTR,
    },
    "keep_index_keys": {
        "dtype": INT, "step": PTR, "k": PTR, "k_stride": LONG, "d": LONG, "weight": PTR, "eps": c_float,
        "cos_sin": PTR, "rotary_dim": LONG, "group": LONG, "block_size": LONG, "kept": PTR,
    },
    "select_keys": {
        "dtype": INT, "step": PTR, "q": PTR, "q_stride": LONG, "num_heads": LONG, "d": LONG, "cos_sin": PTR,
        "rotary_dim": LONG, "kept": PTR, "group": LONG, "budget": LONG, "block_size": LONG, "slots": PTR,
    },
    "attend_slots": {
        "kv": PTR, "q": PTR, "q_stride": LONG, "scale": c_float, "slots": PTR, "num_tokens": LONG, "width": LONG,
        "out": PTR,
    },
}  # fmt: skip


class Kernel:
    """One kernel. A call releases the GIL; while a step is being recorded it is also put on the tape."""

    __slots__ = ("_function", "_recording", "_struct", "address", "name", "pointers")

    def __init__(self, dll: ctypes.CDLL, name: str, recording: Recording) -> None:
        fields = CALLS[name]
        self.name = name
        self.pointers = tuple(field for field, kind in fields.items() if kind is PTR)
        self._struct: Any = type(name, (Structure,), {"_fields_": [*fields.items(), ("threads", c_int32)]})
        self._function = dll[f"blade_{name}"]
        self._function.restype = c_int
        self.address = ctypes.cast(self._function, c_void_p).value or 0
        self._recording = recording

    def __call__(self, *arguments: Any) -> None:
        """The fields of the call struct in order. Raises MemoryError where the kernel has no room for its scratch."""
        call = self._struct(*arguments)
        check_status(self._function(byref(call)))
        if self._recording.tape is not None:
            self._recording.tape.append((self, call))


class Recording(threading.local):
    """Where the kernels that this thread calls are noted down, if anywhere, and which steps their arguments name."""

    tape: list[tuple[Kernel, Structure]] | None = None
    steps: list[Any] = []  # noqa: RUF012 - replaced, never changed


class Library:
    """The kernels of one instruction-set level."""

    linear: Kernel
    unpack_rows: Kernel
    take_rows: Kernel
    scale_rows: Kernel
    copy_rows: Kernel
    add_rows: Kernel
    rms_norm: Kernel
    add_rms_norm: Kernel
    silu_mul: Kernel
    sigmoid_mul: Kernel
    rope_and_store: Kernel
    attend: Kernel
    argmax: Kernel
    draw: Kernel
    logprobs: Kernel
    route: Kernel
    experts: Kernel
    short_conv: Kernel
    gated_delta: Kernel
    gated_rms_norm: Kernel
    keep_index_keys: Kernel
    select_keys: Kernel
    attend_slots: Kernel

    def __init__(self, level: str) -> None:
        self.level = level
        self.recording = Recording()
        self.regions = Regions()  # of packed weights
        self._dll = open_library(level)
        for name in CALLS:
            setattr(self, name, Kernel(self._dll, name, self.recording))
        self.packed_bytes = self._function("packed_bytes", LINEAR, result=LONG)
        self.pack_dense = self._function("pack_dense", LINEAR, PTR, INT)
        self.pack_blocks = self._function("pack_blocks", LINEAR, PTR, INT, INT)
        self.pack_grouped = self._function("pack_grouped", LINEAR, POINTER(CGrouped), INT)
        self.pack_float8 = self._function("pack_float8", LINEAR, POINTER(CFloat8), INT)
        self.round = self._function("round", POINTER(CRounding), INT)
        self.read = self._function("read", PTR, LONG, INT)
        self.multiply = self._function("multiply", PTR, INT, LONG, INT, result=LONG)
        self.touch = self._function("touch", PTR, LONG)
        self.replay = self._function("replay", PTR, LONG)

    def _function(self, name: str, *arguments: Any, result: Any = c_int) -> Callable[..., int]:
        function = self._dll[f"blade_{name}"]
        function.argtypes, function.restype = arguments, result
        return function


def check_status(status: int) -> None:
    if status == OUT_OF_RANGE:
        raise IndexError("the id of an expert is out of range")
    if status:
        raise MemoryError("no memory for a kernel's scratch")


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
    portable = open_library("portable")
    runnable = range(portable.blade_machine_level() + 1)
    return [MACHINE_LEVELS[i] for i in sorted(runnable, key=portable.blade_level_rank, reverse=True)]


def load(environ: Mapping[str, str] = os.environ) -> Library:
    """The best library for this machine, or the one BLADE_CPU_ISA names.

    Raises Unavailable when the kernels are missing or stale, ConfigError when the machine lacks what was named.
    """
    runnable = runnable_levels()
    level = environ.get("BLADE_CPU_ISA")
    if level is None:
        level = next(level for level in runnable if build.is_current(level))
        if level != runnable[0]:
            log.warning(
                "The CPU kernels were compiled on a machine without %s, which this one has, or by a compiler that does "
                "not know it. Build them here: python -m blade_native.simd.build",
                runnable[0],
            )
    if level not in runnable:
        raise ConfigError(f"BLADE_CPU_ISA={level} cannot run here.", f"This machine runs: {', '.join(runnable)}.")
    return Library(level)
