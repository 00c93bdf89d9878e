"""Linears whose rows are put into another order, in each of the formats that a checkpoint may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blade import Float8Weight, GroupedWeight, QuantizedWeight
from blade.nn.row_order import RowOrder, as_ops
from blade_native.reference import TorchOps, dequantize

SIZES = (8, 4)  # rows of the matrices of the stack
ORDER = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 11, 8, 10, 9])
K = 32


def grouped(n: int) -> QuantizedWeight:
    q = torch.randint(16, (n, K), dtype=torch.uint8)
    scales = torch.rand(n, K // 16, dtype=torch.float16)
    return GroupedWeight(4, 16, q, scales, zeros=torch.randint(16, (n, K // 16), dtype=torch.uint8))


def float8(height: int) -> Callable[[int], QuantizedWeight]:
    def make(n: int) -> QuantizedWeight:
        return Float8Weight(torch.randn(n, K).to(torch.float8_e4m3fn), torch.rand(n // height, 2) + 0.1, (height, 16))

    return make


@pytest.mark.parametrize("make", [grouped, float8(1), float8(2), float8(4)], ids=["grouped", "row", "2", "4"])
def test_quantised_matrices(make: Callable[[int], QuantizedWeight]) -> None:
    torch.manual_seed(0)
    weights, bias, x = [make(n) for n in SIZES], torch.randn(sum(SIZES)), torch.randn(3, K)
    whole = torch.cat([dequantize(weight, torch.float32) for weight in weights])
    linear = RowOrder(TorchOps(), ORDER).quantized_linear(weights, bias)
    torch.testing.assert_close(linear(x), x @ whole[ORDER].T + bias[ORDER])


def test_whole_blocks_of_float8_stay_blocks() -> None:
    seen: list[Any] = []

    class Noting(TorchOps):
        def quantized_linear(self, weights: Any, bias: Any) -> Any:
            seen.extend(weights)
            return super().quantized_linear(weights, bias)

    RowOrder(Noting(), ORDER).quantized_linear([float8(2)(8), float8(2)(4)], None)
    assert [weight.block for weight in seen] == [(2, 16), (1, 16)]  # the second's rows are shuffled


def test_plain_matrices_one_after_the_other() -> None:
    torch.manual_seed(0)
    ops, x = RowOrder(TorchOps(), ORDER), torch.randn(3, K)
    for start, n in ((0, 8), (8, 4)):
        weight, bias = torch.randn(n, K), torch.randn(n)
        rows = ORDER[start : start + n] - start
        torch.testing.assert_close(ops.linear(weight, bias)(x), x @ weight[rows].T + bias[rows])
    assert as_ops(ops).name == "torch"


def test_an_order_that_leaves_its_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves a matrix of 8 rows"):
        RowOrder(TorchOps(), ORDER.flip(0)).linear(torch.randn(8, K), None)
