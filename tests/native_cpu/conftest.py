"""The kernels of every instruction-set level that this machine can run."""

from __future__ import annotations

import os

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
def library(request: pytest.FixtureRequest) -> Library:
    if reason := unavailable():
        pytest.skip(reason)
    if request.param not in runnable_levels():
        return emulated_library(request.param)
    if not build.is_current(request.param):
        pytest.skip(f"{request.param} is not compiled: BLADE_CPU_LEVELS=all python -m blade_native.simd.build")
    return load({**os.environ, "BLADE_CPU_ISA": request.param})


def emulated_library(level: str) -> Library:
    if not os.environ.get("BLADE_CPU_EMULATE"):
        pytest.skip(f"this machine cannot run {level}; `just avx512-check` emulates it")
    return Library(emulated.library_name(level))


@pytest.fixture
def ops(library: Library) -> SimdOps:
    return SimdOps(TorchOps(), library, THREADS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
