"""What the double refuses of a launch made without the launch layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from blade_native.emulator import CupyDouble
from blade_native.emulator.build import CompileError
from blade_native.emulator.cupy_double import Stream
from blade_native.emulator.kernel_double import CUDADriverError

if TYPE_CHECKING:
    from blade_native.emulator.kernel_double import RawKernel

CODE = 'extern "C" __global__ void f(float* y, float a, int n) { if (n) y[threadIdx.x] = a; }'


@pytest.fixture(scope="module")
def kernel() -> RawKernel:
    return CupyDouble().RawModule(code=CODE).get_function("f")


@pytest.fixture
def y() -> torch.Tensor:
    return torch.zeros(32)


def test_arguments_as_cupy_passes_them(kernel: RawKernel, y: torch.Tensor) -> None:
    kernel((1,), (32,), (y.data_ptr(), np.float32(2), np.int32(1)), stream=Stream())
    assert (y == 2).all()


@pytest.mark.parametrize("a", [2.0, np.float64(2), np.int32(2)])
def test_a_float_of_another_kind(kernel: RawKernel, y: torch.Tensor, a: object) -> None:
    with pytest.raises(TypeError, match="argument 1"):
        kernel((1,), (32,), (y.data_ptr(), a, np.int32(1)), stream=Stream())


def test_a_tensor_a_wide_int_and_a_missing_argument(kernel: RawKernel, y: torch.Tensor) -> None:
    for wrong in ((y, np.float32(1), np.int32(1)), (y.data_ptr(), np.float32(1), 1), (y.data_ptr(), np.float32(1))):
        with pytest.raises(TypeError):
            kernel((1,), (32,), wrong, stream=Stream())


def test_no_stream(kernel: RawKernel, y: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="stream"):
        kernel((1,), (32,), (y.data_ptr(), np.float32(2), np.int32(1)))


@pytest.mark.parametrize(("grid", "block"), [((0,), (32,)), ((1,), (2048,)), ((1,), (64, 32)), ((1, 70000), (32,))])
def test_launch_limits(kernel: RawKernel, y: torch.Tensor, grid: tuple[int], block: tuple[int]) -> None:
    with pytest.raises(CUDADriverError, match="INVALID_VALUE"):
        kernel(grid, block, (y.data_ptr(), np.float32(2), np.int32(1)), stream=Stream())


def test_shared_memory_needs_its_opt_in(kernel: RawKernel, y: torch.Tensor) -> None:
    arguments = (y.data_ptr(), np.float32(2), np.int32(1))
    with pytest.raises(CUDADriverError):
        kernel((1,), (32,), arguments, shared_mem=50000, stream=Stream())
    with pytest.raises(CUDADriverError):
        kernel.max_dynamic_shared_size_bytes = 300000
    kernel.max_dynamic_shared_size_bytes = 50000
    kernel((1,), (32,), arguments, shared_mem=50000, stream=Stream())


def test_unknown_names_and_broken_code() -> None:
    with pytest.raises(CUDADriverError, match="NOT_FOUND"):
        CupyDouble().RawModule(code=CODE).get_function("g")
    with pytest.raises(CompileError, match="nonsense"):
        CupyDouble().RawModule(code="nonsense;", name_expressions=()).compile()
