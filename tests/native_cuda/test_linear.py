"""Packed linears against their twin, TorchQuantizedLinear: every kind of format, any number of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from blade import Float8Weight, GroupedWeight
from blade.nn import dequantize
from blade_native.cuda import linear as cuda_linear
from blade_native.cuda import packing
from blade_native.cuda.linear import (
    COLUMNS,
    MAX_ROWS,
    Device,
    LinearKernels,
    PackedLinear,
    shared_bytes,
    tiles_of_warp,
)
from blade_native.cuda.packing import Format, Packed, format_of, pack
from blade_native.reference import TorchQuantizedLinear

if TYPE_CHECKING:
    from torch import Tensor

    from blade_native.cuda.launch import Launcher

pytestmark = pytest.mark.timeout(600)  # whoever comes first waits for the compiler
BF16, FP16, CPU = torch.bfloat16, torch.float16, torch.device("cpu")
NUM_OUT, NUM_IN = 200, 640  # neither whole blocks of channels nor whole slices
# bits, group, how zeros are given, dtype of x
CASES = [
    (4, 128, "SYMMETRIC", BF16),
    (4, 32, "MINIMA", BF16),
    (4, 16, "ZEROS", FP16),
    (8, 64, "SYMMETRIC", BF16),
    (8, 128, "ZEROS", FP16),
    (6, 16, "SYMMETRIC", BF16),
    (5, 32, "MINIMA", FP16),
]
FP8 = Format(8, 128, "FP8")


def make_weight(
    bits: int, group: int, kind: str, codes: bool = False, n: int = NUM_OUT, k: int = NUM_IN
) -> GroupedWeight:
    """Random; with `codes` a scale is a code times a block's, as in GGUF's K-quants."""
    generator = torch.Generator().manual_seed(bits * group)

    def integers(below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, generator=generator, dtype=torch.uint8)

    def halves(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) * 0.02 + 0.001).half()

    groups, blocks = (n, k // group), (n, k // 128)
    minima = kind == "MINIMA"
    return GroupedWeight(
        bits,
        group,
        integers(2**bits, n, k),
        integers(64, *groups) if codes else halves(*groups),
        (integers(64, *groups) if codes else -halves(*groups)) if minima else None,
        integers(2**bits, *groups) if kind == "ZEROS" else None,
        halves(*blocks) if codes else None,
        -halves(*blocks) if codes and minima else None,
    )


@pytest.fixture(scope="module")
def kernels(launcher: Launcher) -> LinearKernels:
    """Compiled together."""
    found = LinearKernels(launcher, Device())
    formats = [(format_of(make_weight(bits, group, kind)), dtype) for bits, group, kind, dtype in CASES]
    found.add([*formats, (FP8, BF16), (FP8, FP16)])
    return found


def make_rows(num: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num, NUM_IN, generator=torch.Generator().manual_seed(num)).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize(("bits", "group", "kind", "dtype"), CASES)
def test_formats(kernels: LinearKernels, bits: int, group: int, kind: str, dtype: torch.dtype) -> None:
    weight = make_weight(bits, group, kind)
    bias = torch.randn(NUM_OUT, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear = PackedLinear(kernels, [pack(weight, CPU)], bias, dtype)
    exact = TorchQuantizedLinear([weight], bias)
    for num_rows in (1, 3, 8, 16, 33):
        x = make_rows(num_rows, dtype)
        assert error(linear(x, torch.float32), exact(x.float())) < 2e-6  # the integers are exact, sums in float32
        assert error(linear(x), exact(x.float())) < 2 * torch.finfo(dtype).eps
    assert torch.equal(linear.matrix(linear.parts[0], dtype, 16, 200), dequantize(weight, dtype)[16:])
    x = make_rows(MAX_ROWS + 2, dtype)  # torch's GEMM on the matrix
    assert error(linear(x), exact(x)) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("block", [(NUM_OUT, NUM_IN), (1, NUM_IN), (128, 128)], ids=["one", "channels", "blocks"])
def test_fp8(kernels: LinearKernels, dtype: torch.dtype, block: tuple[int, int]) -> None:
    bits = torch.arange(NUM_OUT * NUM_IN).view(NUM_OUT, NUM_IN) % 256
    bits[(bits & 127) == 127] = 0  # all numbers there are, subnormals too, but NaN
    shape = -(-NUM_OUT // block[0]), -(-NUM_IN // block[1])
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.01
    weight = Float8Weight(bits.to(torch.uint8).view(torch.float8_e4m3fn), scales, block)
    linear = PackedLinear(kernels, [pack(weight, CPU)], None, dtype)
    x = make_rows(5, dtype)
    assert error(linear(x, torch.float32), TorchQuantizedLinear([weight], None)(x.float())) < 2e-6


def test_scales_as_codes(kernels: LinearKernels) -> None:
    weight = make_weight(4, 32, "MINIMA", codes=True)
    linear = PackedLinear(kernels, [pack(weight, CPU)], None, BF16)
    x = make_rows(4, BF16)
    rounding = 2**-11  # of float16
    assert error(linear(x, torch.float32), TorchQuantizedLinear([weight], None)(x.float())) < rounding


ROW_COUNTS = (1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128)


@pytest.mark.parametrize(
    ("bits", "group", "kind"), [(4, 128, "SYMMETRIC"), (8, 64, "SYMMETRIC"), (4, 32, "MINIMA"), (8, 16, "MINIMA")]
)
@pytest.mark.parametrize("num_sms", [132, 1], ids=["slices", "whole"])
def test_a_row_does_not_depend_on_the_rows_beside_it(
    launcher: Launcher, bits: int, group: int, kind: str, num_sms: int
) -> None:
    """Nor on how many rows a block takes: all kernels sum alike."""
    weight = make_weight(bits, group, kind, n=88)
    linear = PackedLinear(LinearKernels(launcher, Device(num_sms)), [pack(weight, CPU)], None, BF16)
    assert (linear.slices[0] < NUM_IN) == (num_sms > 1)
    x = make_rows(MAX_ROWS, BF16)
    together = linear(x, torch.float32)
    assert error(together, TorchQuantizedLinear([weight], None)(x.float())) < 2e-6
    for num_rows in ROW_COUNTS:
        first = MAX_ROWS - num_rows
        assert torch.equal(linear(x[first:], torch.float32), together[first:])


@pytest.mark.parametrize("shape", [(16, 64), (17, 192), (152, 320), (200, 1344)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_tiles_and_slices_that_end_early(launcher: Launcher, bits: int, shape: tuple[int, int]) -> None:
    n, k = shape
    weight = make_weight(bits, 64, "SYMMETRIC", n=n, k=k)
    linear = PackedLinear(LinearKernels(launcher, Device(num_sms=5)), [pack(weight, CPU)], None, BF16)
    for num_rows in (1, 13, 40):
        x = torch.randn(num_rows, k, generator=torch.Generator().manual_seed(n)).to(BF16)
        assert error(linear(x, torch.float32), TorchQuantizedLinear([weight], None)(x.float())) < 2e-6


def test_matrices_are_cut_to_fill_the_device(launcher: Launcher) -> None:
    """A 7B model's: no SM has much more to do than the average, whatever the batch, and none has nothing to do."""
    kernels = LinearKernels(launcher, Device())
    for bits, n, k in ((4, 18944, 3584), (8, 37888, 3584), (4, 3584, 18944), (8, 3584, 3584), (4, 4608, 3584)):
        packed = Packed(Format(bits, 128, "SYMMETRIC"), n, k, torch.empty(0), torch.empty(0))
        num_slices = -(-k // kernels.slice_of(packed))
        for columns in COLUMNS:
            warps = kernels.warps_of(packed, columns)
            tiles = warps * tiles_of_warp(columns)
            num_blocks = -(-n // (16 * tiles)) * num_slices
            busiest = -(-num_blocks // 132)
            assert num_blocks > 0.8 * 132 * busiest or busiest <= 2
            assert num_blocks > 0.8 * 132
            assert shared_bytes(packed.format, columns, warps) < kernels.device.shared_bytes


def test_stacked_formats_write_side_by_side(kernels: LinearKernels) -> None:
    weights = [make_weight(4, 32, "MINIMA"), make_weight(8, 64, "SYMMETRIC"), make_weight(4, 32, "MINIMA", n=7)]
    bias = torch.arange(2 * NUM_OUT + 7).to(BF16)
    linear = PackedLinear(kernels, [pack(weight, CPU) for weight in weights], bias, BF16)
    x = make_rows(3, BF16)
    exact = TorchQuantizedLinear(weights, bias)
    assert error(linear(x, torch.float32), exact(x.float())) < 2e-6
    assert error(linear(x.view(3, 1, NUM_IN)), exact(x.view(3, 1, NUM_IN))) < 0.02
    assert linear(x[:0]).shape == (0, 2 * NUM_OUT + 7)


def test_many_rows_take_the_matrix_in_pieces(kernels: LinearKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_linear, "MAX_MATRIX_BYTES", 64 * NUM_IN * 2)
    weights = [make_weight(4, 32, "MINIMA"), make_weight(8, 64, "SYMMETRIC")]
    bias = torch.arange(2 * NUM_OUT).to(BF16)
    x = make_rows(MAX_ROWS + 1, BF16)
    found = PackedLinear(kernels, [pack(weight, CPU) for weight in weights], bias, BF16)(x, torch.float32)
    assert error(found, TorchQuantizedLinear(weights, bias)(x)) < 0.01


def test_rows_that_are_not_aligned(kernels: LinearKernels) -> None:
    linear = PackedLinear(kernels, [pack(make_weight(8, 64, "SYMMETRIC"), CPU)], None, BF16)
    wide = torch.randn(4, NUM_IN + 3, generator=torch.Generator().manual_seed(2)).to(BF16)
    assert torch.equal(linear(wide[:, 3:]), linear(wide[:, 3:].contiguous()))


def test_values_of_a_table_become_integers_of_8_bits(kernels: LinearKernels) -> None:
    values = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    weight = replace(make_weight(4, 64, "SYMMETRIC"), values=values)
    assert packing.covers(weight)
    linear, x = PackedLinear(kernels, [pack(weight, CPU)], None, BF16), make_rows(3, BF16)
    assert error(linear(x, torch.float32), TorchQuantizedLinear([weight], None)(x.float())) < 2e-6
    assert torch.equal(linear.rows(torch.arange(NUM_OUT), BF16), dequantize(weight, BF16))


def test_embedding_rows(kernels: LinearKernels) -> None:
    weight = make_weight(6, 16, "SYMMETRIC")
    linear = PackedLinear(kernels, [pack(weight, CPU)], None, BF16)
    ids = torch.tensor([0, 199, 7, 7, 15, 16])
    assert torch.equal(linear.rows(ids, BF16), dequantize(weight, BF16)[ids])


def test_what_has_no_kernel() -> None:
    assert packing.covers(make_weight(4, 32, "ZEROS"))
    assert not packing.covers(make_weight(4, 32, "ZEROS", k=96))
    nan = torch.full((16, 64), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="NaN"):
        pack(Float8Weight(nan, torch.ones(1, 1), (16, 64)), CPU)
    with pytest.raises(ValueError, match="scales have shape"):
        pack(Float8Weight(torch.zeros(16, 64).to(torch.float8_e4m3fn), torch.ones(3, 1), (16, 64)), CPU)
    weight = make_weight(4, 32, "SYMMETRIC", codes=True)
    weight.block_scales.fill_(6e4)
    with pytest.raises(ValueError, match="scales: a group's value is beyond float16"):
        pack(weight, CPU)


def test_x_in_float32_is_refused(kernels: LinearKernels) -> None:
    linear = PackedLinear(kernels, [pack(make_weight(8, 64, "SYMMETRIC"), CPU)], None, BF16)
    with pytest.raises(TypeError, match="float16 or bfloat16, not torch"):
        linear(torch.zeros(1, NUM_IN))
