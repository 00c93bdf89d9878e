"""Mixtures of experts from their folder: what is counted, and what --quantize does to them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from checkpoints import CASES, make_reference
from safetensors.torch import save_file
from stepper import Stepper, all_together

from blade import Config, EngineConfig, ModelOptions
from blade.assembly import Assembly, choose, load_model
from blade.nn.tensors import loaded_bytes
from blade.plugins import load

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoints import Reference


@pytest.fixture(scope="module", params=["", " fused"], ids=["one by one", "fused"])
def reference(request: pytest.FixtureRequest) -> Reference:
    """Of sizes that divide into groups."""
    family, settings = CASES["qwen2 moe"]
    name = f"qwen2 moe of even sizes{request.param}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, name, (family, settings | {"moe_intermediate_size": 64}))
        return make_reference(name)


@pytest.fixture
def folder(reference: Reference, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(reference.config))
    tensors = {name: tensor.clone() for name, tensor in reference.weights.tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def chosen(folder: Path, quantize: str | None) -> Assembly:
    options = ModelOptions(model=str(folder), dtype="float32", quantize=quantize)
    return choose(Config(model=options, engine=EngineConfig(threads=1)), load())


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_every_byte_is_told_of_once(folder: Path, quantize: str | None) -> None:
    assembly, told = chosen(folder, quantize), list[int]()
    load_model(assembly, told.append)
    assert sum(told) == assembly.weight_bytes
    assert len(told) == len(list(assembly.weights.names()))


def test_experts_are_rounded_and_routers_are_not(folder: Path, reference: Reference) -> None:
    assembly = chosen(folder, "int8")
    router, expert = (f"model.layers.0.mlp.{name}.weight" for name in ("gate", "experts.5.down_proj"))
    plain = [
        loaded_bytes(name, assembly.weights, assembly.ops, torch.float32, assembly.form.quantization) / (4 * size)
        for name, size in ((router, 6 * 64), (expert, 64 * 64))
    ]
    assert plain == [1.0, 33 / 32 / 4]
    stepper = Stepper(reference)
    stepper.forward = assembly.ops.capture(load_model(assembly), stepper.kv, assembly.capture)
    found = stepper.run(all_together([len(prompt) for prompt in reference.prompts], seed=0))
    errors = torch.cat([a - b for a, b in zip(found, reference.logits, strict=True)]).abs().amax(1)
    assert 1e-3 < float(errors.median()) < float(reference.logits[0].std()) / 4  # few tokens change their experts


@pytest.mark.parametrize("case", ["qwen3 next dense", "llama4"])
def test_rows_that_are_reordered_can_be_rounded(case: str, tmp_path: Path) -> None:
    reference = make_reference(case)
    (tmp_path / "config.json").write_text(json.dumps(reference.config))
    save_file(reference.weights.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assembly = chosen(tmp_path, "int8")
    stepper = Stepper(reference)
    stepper.model = load_model(assembly)
    stepper.forward = assembly.ops.capture(stepper.model, stepper.kv, assembly.capture)
    found = stepper.run(all_together([len(prompt) for prompt in reference.prompts], seed=0))
    errors = torch.cat([a - b for a, b in zip(found, reference.logits, strict=True)]).abs().amax(1)
    assert 1e-3 < float(errors.median()) < float(reference.logits[0].std()) / 4
