"""Checkpoints as the tools write them mean what the tools say that they mean."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from format_cases import (
    CASES,
    EXPECTED,
    FIXTURES,
    RENAMED,
    assembled,
    dense,
    logits,
    make,
    opened,
    settings_of,
    stored,
)
from safetensors.torch import save_file

from blade import CheckpointError, Float8Weight, GroupedWeight, QuantizedWeight
from blade_native.cpu import CpuOps
from blade_native.reference import TorchOps

# The tables of bitsandbytes become integers, which costs up to 0.4 % of a block's largest number.
TABLES = {"bnb-nf4": 0.02, "bnb-fp4": 0.02}  # of a product's norm; elsewhere that of scales in float16
IN_HALF = dict.fromkeys(
    ("torchao-int4", "hqq", "hqq-3", "hqq-8", "hqq-few", "hqq-columns"), 2**-10
)  # minima in float16 too
TOLERANCE = TABLES | IN_HALF
HEADS = {"torchao-embeddings": 32 * 64}  # a tied head that is there once more
NUM_PARAMS = 32 * 64 + 64 * 3 + (32 + 32 + 32 + 32) * 64 + 3 * 96 * 64


def modules(case: str) -> list[str]:
    return [key.partition("/")[2] for key in EXPECTED if key.startswith(f"{case}/model.")]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_tool_makes_of_them(case: str) -> None:
    settings, weights = opened(case)
    assert modules(case)
    for module in modules(case):
        w = dense(settings, weights, module).double()
        found = w @ torch.sin(torch.arange(1, w.shape[1] + 1, dtype=torch.float64) ** 2)
        expected = EXPECTED[f"{case}/{module}"].double()
        error = float((found - expected).norm() / expected.norm())
        assert error < TOLERANCE.get(case, 2**-11), module


@pytest.mark.parametrize("case", CASES)
def test_the_headers_tell_what_the_matrices_take(case: str) -> None:
    settings, weights = opened(case)
    quantization = make(settings)
    for module in modules(case):
        _, matrix = quantization.find(module, weights)
        weight = quantization.weight(module, weights)
        assert matrix
        assert matrix.shape == tuple(weight.q.shape)
        assert matrix.num_bytes == num_bytes(weight), module


def num_bytes(weight: QuantizedWeight) -> int:
    if isinstance(weight, Float8Weight):
        return weight.q.nbytes + weight.scales.nbytes
    assert isinstance(weight, GroupedWeight)
    assert int(weight.q.max()) < 2**weight.bits
    beside = [x for x in (weight.scales, weight.zeros, weight.minima) if x is not None]
    return prod(weight.q.shape) * weight.bits // 8 + sum(x.nbytes for x in beside)


@pytest.mark.parametrize("case", CASES)
def test_a_model_computes_what_transformers_does(case: str) -> None:
    served, unpacked = assembled(FIXTURES / case), assembled(FIXTURES / case, "none")
    num_params = NUM_PARAMS + HEADS.get(case, 0)
    assert served.num_params == unpacked.num_params == num_params
    assert served.weight_bytes < unpacked.weight_bytes / 2 or case == "hqq-columns"  # which becomes plain
    assert unpacked.weight_bytes == 4 * num_params
    assert served.form.label.startswith(settings_of(FIXTURES / case)["quant_method"])
    expected = EXPECTED[f"{case}/logits"]
    found = logits(served)
    tolerance = 0.05 if case in TABLES else 6 * TOLERANCE.get(case, 2**-11)
    assert float((found - expected).norm() / expected.norm()) < tolerance
    torch.testing.assert_close(logits(unpacked), found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", RENAMED)
def test_formats_that_differ_in_names_alone(case: str, tmp_path: Path) -> None:
    config, tensors = stored(case)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    served = assembled(tmp_path)
    assert served.num_params == NUM_PARAMS
    assert served.form.label.startswith(config["quantization_config"]["quant_method"])
    expected = EXPECTED[f"{RENAMED[case][0]}/logits"]
    assert float((logits(served) - expected).norm() / expected.norm()) < 0.003


def test_settings_may_lie_in_a_file_of_model_optimizer(tmp_path: Path) -> None:
    config, tensors = stored("modelopt")
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    file = tmp_path / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": settings}))
    assert assembled(tmp_path).form.label == "modelopt, NVFP4"
    file.write_text(json.dumps({"quantization": 3}))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json has no object quantization\."):
        assembled(tmp_path)


def test_without_kernels_they_are_dequantised_with_a_word() -> None:
    plain = assembled(FIXTURES / "gptq", ops=TorchOps())
    assert "the device (torch) has no kernels for quantised weights in float32" in plain.form.label
    assert logits(plain).equal(logits(assembled(FIXTURES / "gptq", "none")))


def test_a_quantised_embedding_is_dequantised_too() -> None:
    """On an op set whose linears cannot be read back as tables."""
    plain = assembled(FIXTURES / "mlx", ops=CpuOps())
    torch.testing.assert_close(logits(plain), logits(assembled(FIXTURES / "mlx", "none")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "label"),
    [
        ("gptq", "gptq, 4 bits in groups of 32"),
        ("gptq-v2-act-order-3", "gptq, 3 bits in groups of 32, kept as 4"),
        ("auto-round-asym-2", "auto-round, 2 bits, kept as 4"),
        ("ct-groups", "compressed-tensors, int8 in whole rows and int3 in groups of 32, kept as 4"),
        ("ct-fp8-block", "compressed-tensors, fp8 in blocks of 32 by 32"),
        ("bnb-nf4", "bitsandbytes, nf4"),
        ("mlx-3", "mlx, 3 bits in groups of 32, kept as 4"),
        ("hqq", "hqq, 4 bits"),
        ("hqq-columns", "hqq, 8 bits, as plain numbers for axis is 0"),
        ("torchao-int8", "torchao, Int8DynamicActivationInt8Weight"),
    ],
)
def test_the_start_says_what_is_kept(case: str, label: str) -> None:
    assert assembled(FIXTURES / case).form.label == label
