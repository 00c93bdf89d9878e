"""Rounding in the kernels against rounding in torch (plugins/blade_rtn)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blade import GroupedWeight
from blade_native.reference import dequantize
from blade_native.simd.ops import SimdOps
from blade_rtn.int4 import nest_int4, quantize_int4
from blade_rtn.symmetric import quantize_symmetric

BITS = (4, 6, 8)
N, K = 37, 384  # rows that fill no whole item, groups that fill no whole vector
PARTS = ("q", "scales", "minima", "block_scales", "block_minima")


def weights_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(N, K, generator=generator)
    tails = normal / torch.rand(N, K, generator=generator).clamp(min=0.05)
    return {"normal": normal * 0.02, "tails": tails, "positive": normal.abs() + 1, "negative": -normal.abs()}[kind]


def twin_of(ops: SimdOps, bits: int) -> Callable[[Tensor, int], GroupedWeight]:
    if bits > 4:
        return lambda weight, group: quantize_symmetric(weight, bits, group)
    nests = ops.library.level in ("avx512vnni", "avx512bf16", "amx")
    return nest_int4 if nests else quantize_int4


def error(found: GroupedWeight, weight: Tensor) -> float:
    return float((dequantize(found, torch.float32) - weight.float()).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "tails", "positive", "negative"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_as_close_as_its_twin(ops: SimdOps, bits: int, group: int, kind: str, dtype: torch.dtype) -> None:
    weight = weights_of(kind).to(dtype)
    found, want = ops.round_weight(weight, bits, group), twin_of(ops, bits)(weight, group)
    assert found is not None
    assert (found.bits, found.group) == (bits, group)
    for part in PARTS:
        x, y = getattr(found, part), getattr(want, part)
        assert (None if x is None else (x.dtype, x.shape)) == (None if y is None else (y.dtype, y.shape))
    assert (found.q == want.q).float().mean() > 0.95  # of units that are equally good either may be taken
    assert abs(error(found, weight) / error(want, weight) - 1) < 1e-3


def test_zeros_alike_numbers_and_the_smallest_are_as_in_the_twin(ops: SimdOps) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2], weight[3] = 0.25, -3.0, 1e-7
    for bits in BITS:
        found, want = ops.round_weight(weight, bits, 32), twin_of(ops, bits)(weight, 32)
        assert found is not None
        torch.testing.assert_close(dequantize(found, torch.float32), dequantize(want, torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays_so_in_its_row_alone(ops: SimdOps, bits: int, bad: float) -> None:
    weight = weights_of("normal")
    weight[3, 70] = bad
    for found in (ops.round_weight(weight, bits, 32), twin_of(ops, bits)(weight, 32)):
        assert found is not None
        numbers = dequantize(found, torch.float32)
        assert not numbers[3, 70].isfinite()
        assert numbers[torch.arange(N) != 3].isfinite().all()


def test_rows_that_lie_apart_are_the_same_rows(ops: SimdOps) -> None:
    weight = weights_of("normal")
    apart, found = ops.round_weight(weight.T.contiguous().T, 4, 32), ops.round_weight(weight, 4, 32)
    assert apart is not None
    assert found is not None
    assert dequantize(apart, torch.float32).equal(dequantize(found, torch.float32))


def test_what_there_is_no_kernel_for_is_left_to_torch(ops: SimdOps) -> None:
    weight = torch.zeros(2, 96)
    assert ops.round_weight(weight.double(), 8, 32) is None
    assert ops.round_weight(weight, 5, 32) is None
    assert ops.round_weight(weight, 4, 16) is None
    assert ops.round_weight(weight[0], 8, 32) is None
    with pytest.raises(ValueError, match="group of 64 does not divide K = 96"):
        ops.round_weight(weight, 8, 64)
