"""The most likely tokens and their probabilities against torch, ties, infinities and NaN included."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from blade_native.cuda.ops import CudaOps
from blade_native.cuda.selection import MAX_K, SelectKernels
from blade_native.reference import TorchOps, top_k

if TYPE_CHECKING:
    from torch import Tensor

    from blade_native.cuda.launch import Launcher

pytestmark = pytest.mark.timeout(600)  # whoever comes first waits for the compiler
TWIN = TorchOps()


@pytest.fixture(scope="module")
def kernels(launcher: Launcher) -> SelectKernels:
    return SelectKernels(launcher)


def logits(num_rows: int, width: int) -> Tensor:
    return 5 * torch.randn(num_rows, width, generator=torch.Generator().manual_seed(width))


def awkward(x: Tensor) -> Tensor:
    """Many equal values, and some that are no numbers."""
    x = x.round()
    x[:, ::7], x[:, 1::5], x[0, x.shape[1] // 2] = math.nan, -math.inf, math.inf
    return x


@pytest.mark.parametrize(
    ("num_rows", "width", "k"),
    [(1, 1, 1), (3, 100, 100), (2, 4096, 7), (2, 4097, 64), (2, 9001, MAX_K), (1, 33000, 20), (2, MAX_K, MAX_K)],
)
def test_top_k(kernels: SelectKernels, num_rows: int, width: int, k: int) -> None:
    x = logits(num_rows, width)
    for given in (x, x.round(), awkward(x), torch.full_like(x, -math.inf)):
        values, ids = kernels.top_k(given, k)
        expected = top_k(given, k)
        assert torch.equal(ids, expected[1])
        assert torch.equal(values, expected[0])


@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (3, 100), (2, 4097), (1, 70000)])
def test_peaks(kernels: SelectKernels, num_rows: int, width: int) -> None:
    x = logits(num_rows, width)
    for given in (x, x.round(), 1e4 * x, x.masked_fill(x < x.median(), -math.inf)):
        for found, expected in zip(kernels.peaks(given), TWIN.peaks(given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


def test_a_row_with_nothing_to_choose(kernels: SelectKernels) -> None:
    x = torch.full((2, 5000), -math.inf)
    x[1, 4] = math.nan
    ids, peaks, log_sums = kernels.peaks(x)
    assert ids.tolist() == [0, 0]
    assert peaks.tolist() == [-math.inf, -math.inf]
    assert log_sums[0] == -math.inf
    assert log_sums[1].isnan()


def test_zeros_of_both_signs_are_equal(kernels: SelectKernels) -> None:
    x = torch.zeros(1, 300)
    x[0, :40] = -0.0
    assert kernels.peaks(x)[0].tolist() == [0]
    assert kernels.top_k(x, 3)[1].tolist() == [[0, 1, 2]]


def test_rows_with_a_stride(kernels: SelectKernels) -> None:
    wide = logits(3, 5000)
    assert torch.equal(kernels.top_k(wide[:, 3:4500], 9)[1], top_k(wide[:, 3:4500], 9)[1])
    assert torch.equal(kernels.peaks(wide[:, 3:4500])[0], TWIN.argmax(wide[:, 3:4500])[1])


def test_the_op_set_leaves_the_rest_to_torch(launcher: Launcher) -> None:
    ops = CudaOps(TWIN, launcher)
    x = logits(2, 3000)
    before = len(launcher.cupy.launches)
    assert torch.equal(ops.argmax(x.double())[1], TWIN.argmax(x)[1])
    assert torch.equal(ops.logprobs(x.double(), 3)[2], TWIN.logprobs(x, 3)[2])
    assert len(launcher.cupy.launches) == before
    assert all(map(torch.equal, ops.argmax(x), TWIN.argmax(x)))
    assert len(launcher.cupy.launches) == before + 2


@pytest.mark.parametrize("k", [0, 5, MAX_K + 1])
def test_logprobs(launcher: Launcher, k: int) -> None:
    x = logits(2, 3000)
    for found, expected in zip(CudaOps(TWIN, launcher).logprobs(x, k), TWIN.logprobs(x, k), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
