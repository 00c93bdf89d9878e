"""Rounding to 8 and to 4 bits: how far off it is, what it keeps exactly, and its odd corners."""

from __future__ import annotations

import pytest
import torch

from blade import GroupedWeight
from blade.nn import dequantize
from blade.nn.tensors import num_params
from blade.testing import TensorWeights
from blade_native.simd.grouped import covers
from blade_rtn import int4, symmetric
from blade_rtn.int4 import quantize_int4
from blade_rtn.rtn import Int4
from blade_rtn.symmetric import quantize_symmetric


def normal(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02


def relative_error(weight: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


def quantize_int8(weight: torch.Tensor, group: int) -> GroupedWeight:
    return quantize_symmetric(weight, 8, group)


def quantize_int6(weight: torch.Tensor, group: int) -> GroupedWeight:
    return quantize_symmetric(weight, 6, group)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize(("bits", "most_off"), [(8, 0.0065), (6, 0.026)])
def test_symmetric_integers_are_off_by_half_a_step_at_most(bits: int, most_off: float, group: int) -> None:
    weight = normal(70, 192)
    found = quantize_symmetric(weight, bits, group)
    assert (found.bits, found.group, found.scales.shape) == (bits, group, (70, 192 // group))
    assert int(found.q.max()) < 2**bits
    assert covers(found)
    off = (dequantize(found, torch.float32) - weight).abs().view(70, -1, group)
    assert bool((off <= found.scales.float().unsqueeze(2) * 0.51 + weight.abs().max() / 2000).all())
    assert 0 < relative_error(weight, dequantize(found, torch.float32)) < most_off


def test_4_bits_come_closer_than_the_range_of_a_group_alone_would() -> None:
    weight = normal(70, 192)
    found = quantize_int4(weight, 32)
    assert (found.bits, found.group, found.scales.shape) == (4, 32, (70, 6))
    assert found.scales.dtype == found.minima.dtype == torch.uint8
    assert found.block_scales.shape == found.block_minima.shape == (70, 1)
    assert covers(found)
    groups = weight.view(70, 6, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low).view(70, 192)
    assert relative_error(weight, dequantize(found, torch.float32)) < 0.95 * relative_error(weight, plain)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int6, quantize_int4])
def test_rows_do_not_depend_on_chunks_or_dtype(quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(37, 64).bfloat16()
    whole = dequantize(quantize(weight, 32), torch.float32)
    assert dequantize(quantize(weight.float(), 32), torch.float32).equal(whole)
    for module in (symmetric, int4):
        monkeypatch.setattr(module, "CHUNK", 64 * 5)
    assert dequantize(quantize(weight, 32), torch.float32).equal(whole)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int6, quantize_int4])
def test_zeros_stay_zeros_and_alike_numbers_alike(quantize) -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 0.5
    weight[2] = -0.5
    weight[3, 7] = 3.0
    found = dequantize(quantize(weight, 32), torch.float32)
    assert found[0].eq(0).all()
    torch.testing.assert_close(found[1:], weight[1:], rtol=2e-3, atol=1e-3)


def test_what_chooses_experts_stays_plain() -> None:
    class OneShape:
        def shape(self, name: str) -> tuple[int, ...]:
            return (8, 64)

    assert Int4().matrix("model.layers.0.mlp.gate", OneShape()) is None
    assert Int4().matrix("model.layers.0.mlp.experts.3.gate_proj", OneShape()) is not None


def test_only_what_a_model_reads_is_told_to_stay_plain(caplog: pytest.LogCaptureFixture) -> None:
    """All of a checkpoint's numbers are counted, those of eyes too."""
    weights = TensorWeights({"model.visual.proj.weight": torch.zeros(4, 16), "model.mix.weight": torch.zeros(4, 16)})
    assert num_params(weights, Int4()) == 128
    assert not caplog.records
    assert Int4().matrix("model.mix", weights) is None
    assert "model.mix stays plain: its rows of 16 numbers do not divide into groups of 32" in caplog.text
