"""The kernels of every instruction-set level that this machine can run."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest
import torch

from blade_native.reference import TorchOps
from blade_native.simd import build, emulated
from blade_native.simd.library import Library, Unavailable, load, runnable_levels
from blade_native.simd.ops import SimdOps

THREADS = 2


def unavailable() -> str | None:
    try:
        load({})
    except Unavailable as error:
        return str(error)
    return None


@pytest.fixture(params=list(build.levels()))
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    if reason := unavailable():
        pytest.skip(reason)
    if request.param in runnable_levels():
        yield native_library(request.param)
        return
    made = emulated_library(request.param)
    yield made
    if request.param == "amx":
        require_sound_tiles(made)


def native_library(level: str) -> Library:
    if not build.is_current(level):
        pytest.skip(f"{level} is not compiled: BLADE_CPU_LEVELS=all python -m blade_native.simd.build")
    return load({**os.environ, "BLADE_CPU_ISA": level})


def emulated_library(level: str) -> Library:
    if not os.environ.get("BLADE_CPU_EMULATE"):
        recipe = "amx-check" if level == "amx" else "avx512-check"
        pytest.skip(f"this machine cannot run {level}; `just {recipe}` emulates it")
    library = Library(emulated.library_name(level))
    library.level = level
    return library


def require_sound_tiles(library: Library) -> None:
    """That no tile instruction would have been an exception, and that all threads have released their registers."""
    dll = library._dll
    dll.blade_amx_fault.restype = ctypes.c_char_p
    assert dll.blade_amx_fault() is None
    assert dll.blade_amx_in_use() == 0


@pytest.fixture
def ops(library: Library) -> SimdOps:
    return SimdOps(TorchOps(), library, THREADS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
