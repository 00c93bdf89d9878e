"""Mixtures of experts in one kernel call: against their formula, the twin, and row by row against themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blade import Batch
from blade.contracts import Linear
from blade.nn import DefaultOps
from blade_native.reference import dequantize
from blade_native.simd import capture
from blade_native.simd.experts import PackedExperts
from blade_native.simd.ops import SimdOps

from .batches import ragged
from .test_linear_grouped import weight_of

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [1, 2, 7, 33, 200]
SHAPES = [(1, 64, 32), (6, 48, 40), (6, 33, 21), (24, 100, 70)]  # experts, width, inner: panels whole and not, odd K
FORMATS = ["q4_0", "q4_k", "q6_k", "q8_0", "gptq128"]


def choices(num_tokens: int, num_experts: int, k: int) -> tuple[Tensor, Tensor]:
    """Ids [T, k], most of them small, and weights."""
    chances = torch.arange(num_experts, 0, -1).float().pow(3).expand(num_tokens, -1)
    return torch.multinomial(chances, k), torch.rand(num_tokens, k)


def dense(
    ops: SimdOps, num_experts: int, width: int, inner: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, PackedExperts]:
    gate_up = (torch.randn(num_experts, 2 * inner, width) / width**0.5).to(dtype)
    down = (torch.randn(num_experts, width, inner) / inner**0.5).to(dtype)
    made = ops.experts(*([ops.linear(weight, None) for weight in weights] for weights in (gate_up, down)))
    assert isinstance(made, PackedExperts)
    return gate_up, down, made


def exact(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, weigh_input: bool = False) -> Tensor:
    inputs = x[:, None].expand(*ids.shape, -1)
    inputs = inputs * weights.to(x.dtype)[..., None] if weigh_input else inputs
    gate, up = torch.einsum("tkid,tkd->tki", gate_up[ids].double(), inputs.double()).chunk(2, dim=-1)
    hidden = gate * gate.sigmoid() * up * (1 if weigh_input else weights.double()[..., None])
    return torch.einsum("tkdi,tki->td", down[ids].double(), hidden)


def grouped(ops: SimdOps, formats: list[str], width: int, inner: int) -> tuple[list[Linear], list[Linear]]:
    """An expert of each format."""
    gate_up = [ops.quantized_linear(weight_of(kind, 2 * inner, width), None) for kind in formats]
    down = [ops.quantized_linear(weight_of(kind, width, inner), None) for kind in formats]
    return gate_up, down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize(("num_experts", "width", "inner"), SHAPES)
def test_dense_experts_equal_their_formula(
    ops: SimdOps, num_experts: int, width: int, inner: int, weigh_input: bool, dtype: torch.dtype
) -> None:
    gate_up, down, mixture = dense(ops, num_experts, width, inner, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    for num_tokens in TOKENS:
        for k in {1, min(4, num_experts), num_experts}:
            ids, weights = choices(num_tokens, num_experts, k)
            x = torch.randn(num_tokens, width).to(dtype)
            want = exact(x, ids, weights, gate_up, down, weigh_input)
            y = mixture(x, ids, weights, weigh_input)
            assert y.dtype is dtype
            torch.testing.assert_close(y.double(), want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize(
    "formats", [[kind] * 5 for kind in FORMATS] + [FORMATS], ids=lambda f: "+".join(sorted(set(f)))
)
def test_quantised_experts_equal_the_twin(ops: SimdOps, formats: list[str]) -> None:
    gate_up, down = grouped(ops, formats, 256, 512)
    mixture, twin = ops.experts(gate_up, down), DefaultOps.experts(ops, gate_up, down)
    assert isinstance(mixture, PackedExperts)
    for num_tokens in TOKENS:
        ids, weights = choices(num_tokens, 5, 3)
        x = torch.randn(num_tokens, 256).bfloat16()
        want = twin(x.float(), ids, weights)
        atol = 1e-5 * float(want.abs().max())
        torch.testing.assert_close(mixture(x.float(), ids, weights), want, rtol=0, atol=atol)
        torch.testing.assert_close(mixture(x, ids, weights), want.bfloat16(), rtol=2**-7, atol=atol)
        want = twin(x.float(), ids, weights, weigh_input=True)
        atol = 1e-5 * float(want.abs().max())
        torch.testing.assert_close(mixture(x.float(), ids, weights, weigh_input=True), want, rtol=0, atol=atol)


def test_experts_whose_columns_lie_in_orders_of_their_own(ops: SimdOps) -> None:
    """A token alone with several experts is packed once for those of one layout, and for no others."""
    weights = [weight_of("gptq128", 64, 256), weight_of("gptq128", 64, 256), weight_of("q8_0", 64, 256)]
    ordered = [replace(weight, order=torch.randperm(256)) for weight in weights]
    down = [(torch.randn(256, 32) / 8).bfloat16() for _ in weights]
    dense = [dequantize(weight, torch.float32) / 200 for weight in ordered]
    gate_up = [ops.quantized_linear(replace(weight, scales=weight.scales / 200), None) for weight in ordered]
    mixture = ops.experts(gate_up, [ops.linear(weight, None) for weight in down])
    for num_tokens in (1, 3):
        x, shares = torch.randn(num_tokens, 256).bfloat16(), torch.rand(num_tokens, 3)
        ids = torch.stack([torch.randperm(3) for _ in x])
        want = exact(x, ids, shares, torch.stack(dense), torch.stack(down))
        y = mixture(x, ids, shares).double()
        torch.testing.assert_close(y, want, rtol=0, atol=0.04 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "q4_0", "q8_0"])
def test_a_row_does_not_depend_on_the_rows_beside_it(ops: SimdOps, kind: str) -> None:
    num_tokens = 1324  # more than are computed at once
    if kind in ("float32", "bfloat16"):
        _, _, mixture = dense(ops, 12, 64, 96, getattr(torch, kind))
    else:
        mixture = ops.experts(*grouped(ops, [kind] * 12, 64, 96))  # type: ignore[assignment]
    ids, weights = choices(num_tokens, 12, 4)
    x = torch.randn(num_tokens, 64).to(torch.float32 if kind == "float32" else torch.bfloat16)
    one_thread = SimdOps(ops.base, ops.library, 1).experts(mixture.gate_up, mixture.down)
    for weigh_input in (False, True):
        whole = mixture(x, ids, weights, weigh_input)
        for rows in (slice(0, 1), slice(3, 5), slice(0, 7), slice(40, 73), slice(1000, None)):
            assert torch.equal(mixture(x[rows], ids[rows], weights[rows], weigh_input), whole[rows])
        assert torch.equal(one_thread(x, ids, weights, weigh_input), whole)


def test_what_is_not_finite_shows_in_its_row_alone(ops: SimdOps) -> None:
    mixture = ops.experts(*grouped(ops, FORMATS, 256, 512))
    for num_tokens in TOKENS:
        ids, weights = choices(num_tokens, 5, 3)
        x, row = torch.randn(num_tokens, 256), num_tokens // 2
        want = mixture(x, ids, weights)
        x[row, 77] = torch.nan
        y = mixture(x, ids, weights)
        assert y[row].isnan().all()
        y[row] = want[row]
        assert y.equal(want)


def test_bias_and_repeated_experts(ops: SimdOps) -> None:
    gate_up, down = torch.randn(2, 64, 32), torch.randn(2, 32, 32)
    biases = torch.randn(2, 64), torch.randn(2, 32)
    linears = [
        [ops.linear(w, b) for w, b in zip(*pair, strict=True)] for pair in ((gate_up, biases[0]), (down, biases[1]))
    ]
    x, ids, weights = torch.randn(9, 32), torch.tensor([[1, 1]]).expand(9, 2).contiguous(), torch.rand(9, 2)
    gate, up = (x @ gate_up[1].T + biases[0][1]).chunk(2, dim=-1)
    want = ((gate * gate.sigmoid() * up) @ down[1].T + biases[1][1]) * weights.sum(1, keepdim=True)
    torch.testing.assert_close(ops.experts(*linears)(x, ids, weights), want, rtol=1e-4, atol=1e-4)


def test_what_no_kernel_covers_goes_expert_by_expert(ops: SimdOps) -> None:
    weights = torch.randn(3, 16, 8), torch.randn(3, 8, 8)
    for dtype, kind in ((torch.float32, PackedExperts), (torch.float16, object)):
        made = ops.experts(*([ops.linear(weight.to(dtype), None) for weight in each] for each in weights))
        assert isinstance(made, PackedExperts) is (kind is PackedExperts)
        x, ids, shares = torch.randn(2, 8), torch.tensor([[2, 0], [1, 2]]), torch.rand(2, 2)
        want = exact(x, ids, shares, *weights).float()
        torch.testing.assert_close(made(x.to(dtype), ids, shares).float(), want, rtol=1e-2, atol=1e-2)


def test_wrong_input_is_refused(ops: SimdOps) -> None:
    _, _, mixture = dense(ops, 3, 8, 4, torch.float32)
    x, ids, weights = torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    for bad in (-1, 3, 2**62):
        with pytest.raises(IndexError, match="out of range"):
            mixture(x, torch.tensor([[0], [bad]]), weights)
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16"):
        mixture(x.bfloat16(), ids, weights)
    with pytest.raises(ValueError, match="x has shape"):
        mixture(x[:, :7], ids, weights)
    with pytest.raises(ValueError, match="weights has shape"):
        mixture(x, ids, weights[:1])
    with pytest.raises(ValueError, match="needs an expert"):
        mixture(x, ids[:, :0], weights[:, :0])
    with pytest.raises(ValueError, match=r"3 of \[8, 8\] and 2 of \[8, 4\]"):
        ops.experts(mixture.gate_up, mixture.down[:2])
    assert mixture(x[:0], ids[:0], weights[:0]).shape == (0, 8)


def test_a_layer_of_experts_is_captured(ops: SimdOps) -> None:
    _, _, mixture = dense(ops, 8, 64, 32, torch.float32)
    embed = ops.embedding(torch.randn(50, 64))
    router, gate = ops.linear(torch.randn(8, 64), None), ops.linear(torch.randn(1, 64), None)
    calls = 0

    def forward(batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        x = embed(batch.input_ids)
        ids, weights = ops.route(router(x), 2, True)
        return ops.take_rows(ops.sigmoid_mul(mixture(x, ids, weights), gate(x)), batch.logits_rows)

    captured = capture.CapturedForward(forward, ops.library)
    for turn in range(6):
        batch = ragged([1 + turn % 2], [5], 16)
        batch.input_ids = torch.randint(50, (1 + turn % 2,))
        want = forward(batch)
        assert torch.equal(captured(batch), want)
    assert calls == 6 + 2 * 2
