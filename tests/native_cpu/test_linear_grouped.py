"""Linears over quantised weights against their torch twin, in every format that checkpoints bring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blade import GroupedWeight
from blade.nn import dequantize
from blade_native.reference import TorchOps
from blade_native.simd.grouped import covers, nests
from blade_native.simd.linear import PackedLinear, StackedLinear
from blade_native.simd.ops import SimdOps

# bits, group, scales, offsets, groups per block (0: the whole row)
FORMATS = {
    "q4_0": (4, 32, "float16", "none", 1),
    "q4_1": (4, 32, "float16", "minima", 1),
    "q4_k": (4, 32, "uint8", "code minima", 8),
    "q2_k": (4, 16, "uint8", "code minima", 16),
    "q3_k": (4, 16, "int8", "none", 16),
    "four16": (4, 16, "float16", "zeros", 1),
    "rows4": (4, 32, "uint8", "code minima", 0),
    "awq64": (4, 64, "float16", "zeros", 1),
    "gptq128": (4, 128, "float16", "none", 1),
    "q5_0": (5, 32, "float16", "none", 1),
    "q5_1": (5, 32, "float16", "minima", 1),
    "q5_k": (5, 32, "uint8", "code minima", 8),
    "five128": (5, 128, "int8", "code minima", 2),
    "q6_k": (6, 16, "int8", "none", 16),
    "six32": (6, 32, "float16", "zeros", 1),
    "q8_0": (8, 32, "float16", "none", 1),
    "int8": (8, 64, "float16", "none", 1),
    "eight16": (8, 16, "uint8", "none", 0),
    "awq_bf16": (4, 64, "bfloat16", "zeros", 1),
    "four_f32": (4, 128, "float32", "none", 1),
    "eight_bf16": (8, 128, "bfloat16", "minima", 1),
    "channel8": (8, 128, "float32", "none", 1),
    "nvfp4": (4, 16, "float32", "fp4", 1),
    "mxfp4": (4, 32, "bfloat16", "fp4", 1),
    "nf4": (4, 64, "float32", "nf4", 1),
    "values_k": (4, 128, "int8", "fp4", 2),
    "nested32": (4, 32, "uint8", "nested minima", 4),
    "nested64": (4, 64, "uint8", "nested minima", 1),
    "nested128": (4, 128, "uint8", "nested minima", 1),
}
VALUES = {
    "fp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    "nf4": (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127),
}
K = 512
ROWS = [1, 2, 3, 5, 16, 33]


def weight_of(name: str, n: int, k: int = K) -> GroupedWeight:
    bits, group, scales, offsets, per_block = FORMATS[name]
    groups, blocks = k // group, k // group // (per_block or k // group)
    generator = torch.Generator().manual_seed(n)

    def halves(columns: int) -> Tensor:
        return torch.randn(n, columns, generator=generator).half()

    def codes(dtype: torch.dtype) -> Tensor:
        low = -128 if dtype is torch.int8 else 0
        return torch.randint(low, low + 256, (n, groups), generator=generator).to(dtype)

    dtype = getattr(torch, scales)
    q = torch.randint(0, 2**bits, (n, k), generator=generator).byte()
    weight = GroupedWeight(bits, group, q, torch.randn(n, groups, generator=generator).to(dtype))
    if not dtype.is_floating_point:
        weight = replace(weight, scales=codes(dtype), block_scales=halves(blocks))
    if offsets == "minima":
        weight = replace(weight, minima=halves(groups))
    elif offsets == "code minima":
        weight = replace(weight, minima=codes(torch.uint8), block_minima=halves(blocks))
    elif offsets == "nested minima":
        weight = nested(weight, generator)
    elif offsets == "zeros":
        weight = replace(weight, zeros=codes(torch.uint8) % 2**bits)
    elif offsets in VALUES:
        weight = replace(weight, values=VALUES[offsets])
    return weight


def nested(weight: GroupedWeight, generator: torch.Generator) -> GroupedWeight:
    """With codes from all that nests, the largest ones too."""
    scales, share = weight.scales % 16 + 1, torch.rand(weight.scales.shape, generator=generator)
    least = (15 * scales.int() - 127).clamp(min=0)
    minima = (least + (128 - least) * share).round().byte()
    scales[:3], minima[:3] = torch.tensor([[16], [16], [1]]), torch.tensor([[128], [113], [0]])
    weight = replace(weight, scales=scales, minima=minima, block_minima=-weight.block_scales)
    assert nests(weight)
    return weight


def quantised(x: Tensor, group: int) -> Tensor:
    """x as the kernels see it: int8 with a scale for each group of a row."""
    groups = x.float().view(*x.shape[:-1], -1, group)
    bound = groups.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(127.0) / bound  # as the kernels round it: 127 / bound would multiply by a reciprocal
    return ((groups * inverse).round().double() * (bound / 127).double()).reshape(x.shape)


def activation_group(ops: SimdOps, weight: GroupedWeight) -> int:
    """That of the weights, but where nested ones become bytes: all that a block has."""
    if not nests(weight) or ops.library.level not in ("avx512vnni", "avx512bf16", "amx"):
        return weight.group
    return weight.q.shape[1] // weight.block_scales.shape[1]


def require_close(ops: SimdOps, y: Tensor, x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> None:
    """But for float32's rounding of the sums, and that of y's dtype."""
    w = dequantize(weight, torch.float32).double()
    x = quantised(x, activation_group(ops, weight))
    want = x @ w.T + (0 if bias is None else bias.double())
    room = (x.abs() @ w.abs().T + 1) * 2**-20 + want.abs() * torch.finfo(y.dtype).eps
    assert ((y.double() - want).abs() <= room).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_linear_equals_its_twin(ops: SimdOps, name: str) -> None:
    for n in (70, 32):
        weight, bias = weight_of(name, n), torch.randn(n)
        linear, without_bias = ops.quantized_linear(weight, bias), ops.quantized_linear(weight, None)
        for m in ROWS:
            x = torch.randn(m, K)
            require_close(ops, linear(x), x, weight, bias)
            require_close(ops, without_bias(x), x, weight, None)
            x = x.bfloat16()
            require_close(ops, linear(x, torch.float32), x, weight, bias)
            require_close(ops, linear(x), x, weight, bias)


def test_the_twin_is_near_the_kernel(ops: SimdOps) -> None:
    """Without emulating how activations are rounded: they lose half a percent."""
    weight, bias, x = weight_of("q4_1", 70), torch.randn(70), torch.randn(5, K)
    want = TorchOps().quantized_linear([weight], bias)(x)
    error = (ops.quantized_linear([weight], bias)(x) - want).norm() / want.norm()
    assert error < 0.01


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "awq64", "q5_0", "q6_k", "int8", "nvfp4", "nf4", "nested32"])
def test_a_row_does_not_depend_on_the_rows_beside_it(ops: SimdOps, name: str) -> None:
    linear = ops.quantized_linear(weight_of(name, 70, 4096), None)
    x = torch.randn(300, 4096)
    whole = linear(x)
    for m in (1, 2, 3, 7, 13, 17, 50):
        assert linear(x[:m]).equal(whole[:m])
    assert linear(x[299:]).equal(whole[299:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_shows_in_its_row_alone(ops: SimdOps, name: str, bad: float) -> None:
    linear = ops.quantized_linear(weight_of(name, 70), torch.randn(70))
    for m in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            x, row = torch.randn(m, K).to(dtype), m // 2
            x[row, :256] = 0
            want = linear(x)
            for place in (0, 31, 300, K - 1):
                spoilt = x.clone()
                spoilt[row, place] = bad
                y = linear(spoilt)
                assert y[row].isnan().all()
                y[row] = want[row]
                assert y.equal(want)


def test_what_is_almost_nothing_counts_as_nothing(ops: SimdOps) -> None:
    """So little that its inverse is infinite, times which zeros would be NaN."""
    linear, bias = ops.quantized_linear(weight_of("q4_1", 70), torch.ones(70)), torch.ones(5, 70)
    for least in (1e-45, 1e-39, 1e-37):
        x = torch.zeros(5, K)
        x[:, ::7] = least
        assert linear(x).equal(bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_embedding_rows_come_back_from_the_packed_head(ops: SimdOps, name: str, dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 69, 31, 32, 32, *range(20)])
    for order in (None, torch.randperm(K)):
        weight = replace(weight_of(name, 70), order=order)
        linear = ops.quantized_linear(weight, None)
        assert ops.embedding_of(linear, dtype)(ids).equal(dequantize(weight, dtype)[ids])


@pytest.mark.parametrize("name", ["awq64", "channel8", "nvfp4", "nested64"])
def test_columns_in_another_order_are_those_of_permuted_features(ops: SimdOps, name: str) -> None:
    weight, bias, order = weight_of(name, 70), torch.randn(70), torch.randperm(K)
    linear = ops.quantized_linear(replace(weight, order=order), bias)
    for m in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(m, K).to(dtype)
            assert linear(x).equal(ops.quantized_linear(weight, bias)(x[:, order]))


def test_matrices_of_one_order_become_one(ops: SimdOps) -> None:
    first, second = torch.randperm(K), torch.randperm(K)
    weights = [replace(weight_of("q4_0", 64), order=order) for order in (first, first.clone(), second, None)]
    stacked, x = ops.quantized_linear(weights, None), torch.randn(3, K)
    assert isinstance(stacked, StackedLinear)
    assert [part.n for part in stacked.parts] == [128, 64, 64]
    assert stacked(x).equal(torch.cat([ops.quantized_linear(weight, None)(x) for weight in weights], dim=-1))


def test_stacked_linears_write_side_by_side(ops: SimdOps) -> None:
    weights = [weight_of("q4_k", 70), weight_of("q6_k", 33), weight_of("int8", 1)]
    bias, x = torch.randn(104), torch.randn(3, 5, K)
    stacked = ops.quantized_linear(weights, bias)
    assert isinstance(stacked, StackedLinear)
    biases = bias.split([70, 33, 1])
    parts = [ops.quantized_linear(weight, part)(x) for weight, part in zip(weights, biases, strict=True)]
    assert stacked(x).equal(torch.cat(parts, dim=-1))
    assert stacked(x.bfloat16(), torch.float32).shape == (3, 5, 104)
    assert ops.embedding_of(stacked, torch.float32) is None


def test_neighbours_of_one_format_become_one_matrix(ops: SimdOps) -> None:
    weights, bias, x = [weight_of("q4_k", n) for n in (64, 32, 70)], torch.randn(166), torch.randn(3, K)
    whole = ops.quantized_linear(weights, bias)
    assert isinstance(whole, PackedLinear)
    biases = bias.split([64, 32, 70])
    parts = [ops.quantized_linear(weight, part)(x) for weight, part in zip(weights, biases, strict=True)]
    assert whole(x).equal(torch.cat(parts, dim=-1))


@pytest.mark.parametrize(("first", "n"), [("q4_0", 64), ("q4_k", 40)])
def test_another_format_or_a_panel_not_full_begins_a_new_matrix(ops: SimdOps, first: str, n: int) -> None:
    weights, x = [weight_of(first, n), weight_of("q4_k", 64), weight_of("q4_k", 70)], torch.randn(3, K)
    stacked = ops.quantized_linear(weights, None)
    assert isinstance(stacked, StackedLinear)
    assert [part.n for part in stacked.parts] == [n, 134]
    assert stacked(x).equal(torch.cat([ops.quantized_linear(weight, None)(x) for weight in weights], dim=-1))


def test_what_lies_between_the_rows_of_y_stays(ops: SimdOps) -> None:
    linear, x = ops.quantized_linear(weight_of("q8_0", 70), None), torch.randn(9, K)
    y = torch.full((9, 75), 7.0)
    linear.write(x, y[:, 2:72])
    assert y[:, 2:72].equal(linear(x))
    assert (y[:, :2] == 7).all()
    assert (y[:, 72:] == 7).all()


def test_what_no_kernel_computes_on_becomes_dense(ops: SimdOps, caplog: pytest.LogCaptureFixture) -> None:
    """In bfloat16, whatever x is."""
    three = replace(weight_of("q4_1", 70), bits=3)
    small = replace(weight_of("q6_k", 33), bits=5, q=weight_of("q5_0", 33).q)
    assert not covers(three)
    assert not covers(small)
    bias, x = torch.randn(103), torch.randn(3, K)
    linear = ops.quantized_linear([three, small], bias)
    assert "becomes dense" in caplog.text
    want = TorchOps().quantized_linear([three, small], bias)(x)
    assert (linear(x) - want).norm() / want.norm() < 0.01
    assert linear(x).dtype is torch.float32
    assert linear(x.bfloat16()).equal(linear(x).bfloat16())


def test_what_is_not_sound_is_refused_by_name(ops: SimdOps) -> None:
    weight, codes, nf4 = (weight_of(name, 33) for name in ("q4_1", "q4_k", "nf4"))
    refused = {
        "bits is 9": replace(weight, bits=9),
        r"scales are torch.float16 \[33, 16\], not .* \[33, 32\]": replace(weight, group=16),
        "group of 32 does not divide K = 500": replace(weight, q=weight.q[:, :500]),
        "q is torch.int8": replace(weight, q=weight.q.to(torch.int8)),
        "scales are torch.float64": replace(weight, scales=weight.scales.double()),
        "minima are torch.bfloat16": replace(weight, minima=weight.minima.bfloat16()),
        "scales are .*uint8": replace(codes, block_scales=None),
        r"minima are torch.float16 \[33, 15\]": replace(weight, minima=weight.minima[:, 1:]),
        "zeros stand beside minima": replace(weight, zeros=codes.scales),
        "zeros are torch.float16": replace(weight, minima=None, zeros=weight.scales),
        "block_minima without minima": replace(codes, minima=None),
        "block_minima have another shape": replace(codes, block_minima=codes.block_minima[:, :1]),
        "block_scales divide K = 512 into 3": replace(codes, block_scales=torch.zeros(33, 3).half()),
        "block_scales are torch.float32": replace(codes, block_scales=codes.block_scales.float()),
        r"values are \(0, 128,": replace(nf4, values=(0, 128, *nf4.values[2:])),
        "values are 15 for 4 bits": replace(nf4, values=nf4.values[1:]),
        "values stand beside": replace(nf4, zeros=nf4.q[:, ::64]),
        "group of 0 does not divide": replace(nf4, group=0),
        "order is torch.int32": replace(nf4, order=torch.arange(K, dtype=torch.int32)),
        r"order is torch.int64 \[1\]": replace(nf4, order=torch.tensor([0])),
        r"order does not name each of 0..511 once": replace(nf4, order=torch.zeros(K, dtype=torch.int64)),
    }
    for message, wrong in refused.items():
        assert not covers(wrong)
        with pytest.raises(ValueError, match=message):
            ops.quantized_linear(wrong, None)
    assert covers(weight)
    assert covers(codes)


def test_a_dtype_that_nothing_gives_is_refused(ops: SimdOps) -> None:
    linear = ops.quantized_linear(weight_of("q4_1", 33), None)
    with pytest.raises(TypeError, match="float16"):
        linear(torch.zeros(1, K).half())
    with pytest.raises(TypeError, match=r"rows in torch\.float16"):
        linear.rows(torch.tensor([0]), torch.float16)
