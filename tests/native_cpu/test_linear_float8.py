"""Linears over 8-bit floats against their torch twin."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blade import Float8Weight
from blade_native.reference import dequantize
from blade_native.simd.linear import PackedLinear, StackedLinear
from blade_native.simd.ops import SimdOps

from .test_linear_grouped import weight_of

# (N, K) and the block's rows and columns: those of checkpoints, and what does not divide a row
SHAPES = {
    "blocks": ((160, 512), (128, 128)),
    "rows": ((70, 512), (1, 512)),
    "matrix": ((96, 448), (96, 448)),
    "short end": ((130, 200), (64, 128)),
    "odd": ((1, 33), (1, 33)),
    "narrow": ((70, 272), (32, 16)),
}
ROWS = [*range(1, 18), 40]
DTYPES = [torch.float32, torch.bfloat16]


def weight_of_shape(name: str, scale: float = 1.0) -> Float8Weight:
    """All bytes come, but NaN's."""
    (n, k), block = SHAPES[name]
    generator = torch.Generator().manual_seed(n)
    q = torch.randint(0, 256, (n, k), generator=generator)
    q[q & 0x7F == 0x7F] = 0
    scales = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) * scale
    return Float8Weight(q.byte().view(torch.float8_e4m3fn), scales, block)


def require_close(y: Tensor, x: Tensor, weight: Float8Weight, bias: Tensor) -> None:
    """But for float32's rounding of the sums, and that of y's dtype."""
    w, x = dequantize(weight, torch.float32).double(), x.double()
    want = x @ w.T + bias.double()
    room = (x.abs() @ w.abs().T + 1) * 2**-19 + want.abs() * torch.finfo(y.dtype).eps
    assert ((y.double() - want).abs() <= room).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_float8_linear_equals_its_twin(ops: SimdOps, name: str, dtype: torch.dtype) -> None:
    weight = weight_of_shape(name)
    n, k = weight.q.shape
    bias = torch.randn(n)
    linear = ops.quantized_linear(weight, bias)
    assert isinstance(linear, PackedLinear)
    for m in ROWS:
        x = torch.randn(m, k).to(dtype)
        require_close(linear(x, torch.float32), x, weight, bias)
        require_close(linear(x), x, weight, bias)


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(ops: SimdOps, name: str) -> None:
    weight = weight_of_shape(name)
    linear, x = ops.quantized_linear(weight, None), torch.randn(300, weight.q.shape[1])
    whole = linear(x)
    for m in ROWS:
        assert linear(x[:m]).equal(whole[:m])
    assert linear(x[299:]).equal(whole[299:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["blocks", "short end", "odd"])
def test_embedding_rows_come_back_exactly(ops: SimdOps, name: str, dtype: torch.dtype) -> None:
    weight = weight_of_shape(name, scale=2.0**-100)  # subnormals of both formats among them
    ids = torch.arange(len(weight.q)).flip(0)
    linear = ops.quantized_linear(weight, None)
    assert ops.embedding_of(linear, dtype)(ids).equal(dequantize(weight, dtype)[ids])


@pytest.mark.parametrize("m", [1, 40])
def test_nan_spoils_the_outputs_of_its_row_alone(ops: SimdOps, m: int) -> None:
    weight = weight_of_shape("blocks")
    for row, column, byte in ((3, 0, 0x7F), (70, 511, 0xFF)):
        weight.q.view(torch.uint8)[row, column] = byte
    linear, x = ops.quantized_linear(weight, None), torch.randn(m, 512)
    spoilt = linear(x).isnan()
    assert spoilt.any(0).nonzero().flatten().tolist() == [3, 70]
    assert spoilt[:, [3, 70]].all()
    x.zero_()
    assert linear(x).isnan().equal(spoilt)


def test_float8_stands_beside_itself_and_other_formats(ops: SimdOps) -> None:
    weights = [weight_of_shape("blocks"), weight_of_shape("blocks"), weight_of("q8_0", 33)]
    bias, x = torch.randn(353), torch.randn(5, 512)
    stacked = ops.quantized_linear(weights, bias)
    assert isinstance(stacked, StackedLinear)
    assert [part.n for part in stacked.parts] == [320, 33]
    biases = bias.split([160, 160, 33])
    parts = [ops.quantized_linear(weight, part)(x) for weight, part in zip(weights, biases, strict=True)]
    assert stacked(x).equal(torch.cat(parts, dim=-1))


@pytest.mark.parametrize(("block", "most"), [((70, 3), 1.0), ((70, 512), 300.0)])
def test_scales_that_change_too_often_or_are_large_make_it_dense(
    ops: SimdOps, caplog: pytest.LogCaptureFixture, block: tuple[int, int], most: float
) -> None:
    scales = torch.linspace(most / 2, most, -(-512 // block[1]))[None]
    weight = replace(weight_of_shape("rows"), block=block, scales=scales)
    x = torch.randn(3, 512).bfloat16()
    with caplog.at_level(logging.WARNING):
        y = ops.quantized_linear(weight, None)(x, torch.float32)
    assert "becomes dense" in caplog.text
    want = x.float() @ dequantize(weight, torch.bfloat16).float().T
    assert (y - want).norm() < 1e-5 * want.norm()


def test_what_is_not_sound_is_refused_by_name(ops: SimdOps) -> None:
    weight = weight_of_shape("blocks")
    refused = {
        "q is torch.uint8": replace(weight, q=weight.q.view(torch.uint8)),
        "q is torch.float8_e5m2": replace(weight, q=weight.q.view(torch.float8_e5m2)),
        "block is \\(0, 128\\)": replace(weight, block=(0, 128)),
        r"scales are torch.float32 \[2, 4\], not torch.float32 \[160, 4\]": replace(weight, block=(1, 128)),
        "scales are torch.bfloat16": replace(weight, scales=weight.scales.bfloat16()),
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=message):
            ops.quantized_linear(wrong, None)
