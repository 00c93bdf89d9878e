"""Packed linears against x W^T + b in float64, and row by row against themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blade_native.simd.ops import SimdOps

SHAPES = [(32, 16), (1, 2), (70, 33), (96, 448), (40, 4096)]  # (N, K): panels whole and not, odd K, K in slices
ROWS = [1, 2, 3, 7, 11, 12, 13, 24, 25, 50]
DTYPES = [torch.float32, torch.bfloat16]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dense_linear_equals_its_formula(ops: SimdOps, n: int, k: int, dtype: torch.dtype) -> None:
    weight, bias = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)
    linear, without_bias = ops.linear(weight, bias), ops.linear(weight, None)
    for m in ROWS:
        x = torch.randn(m, k).to(dtype)
        y = linear(x, torch.float32)
        torch.testing.assert_close(y.double(), exact(x, weight, bias), rtol=0, atol=1e-4)
        torch.testing.assert_close(without_bias(x, torch.float32).double(), exact(x, weight, None), rtol=0, atol=1e-4)
        torch.testing.assert_close(linear(x), y.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(ops: SimdOps, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(70, 4096).to(dtype), torch.randn(70).to(dtype)
    linear = ops.linear(weight, bias)
    x = torch.randn(400, 4096).to(dtype)
    whole = linear(x, torch.float32)
    for m in ROWS:
        torch.testing.assert_close(linear(x[:m], torch.float32), whole[:m], rtol=0, atol=0)
    torch.testing.assert_close(linear(x[399:], torch.float32), whole[399:], rtol=0, atol=0)


def test_zero_rows_and_leading_axes(ops: SimdOps) -> None:
    linear = ops.linear(torch.randn(40, 8), None)
    assert linear(torch.empty(0, 8)).shape == (0, 40)
    assert linear(torch.randn(2, 3, 8)).shape == (2, 3, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_rows_come_back_from_the_packed_head(ops: SimdOps, dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 69, 31, 32, 32, *range(20)])
    for k in (48, 33):
        weight = torch.randn(70, k).to(dtype)
        torch.testing.assert_close(ops.embedding_of(ops.linear(weight, None), dtype)(ids), weight[ids], rtol=0, atol=0)


def test_wrong_input_is_refused(ops: SimdOps) -> None:
    linear = ops.linear(torch.randn(40, 8), None)
    with pytest.raises(TypeError, match="bfloat16"):
        linear(torch.zeros(1, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="9 features"):
        linear(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="7 features"):
        ops.linear(torch.randn(40, 8).bfloat16(), None)(torch.zeros(1, 7).bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        linear(torch.zeros(8, 2).T)
    with pytest.raises(ValueError, match=r"y has shape \[1, 40\]"):
        linear.write(torch.zeros(2, 8), torch.zeros(1, 40))
    with pytest.raises(ValueError, match="strides"):
        linear.write(torch.zeros(40, 8), torch.zeros(40, 40).T)
