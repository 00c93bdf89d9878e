"""Which form weights are served in, what is said of it, and what it takes: from the command line to the model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoint.writers import write_gguf

from blade import CheckpointError, Config, ConfigError, ModelOptions, SamplingParams, Sequence, Step
from blade.assembly import Assembly, choose, load_model
from blade.banner import describe
from blade.engine.batch import build_batch
from blade.nn.grouped import Stored
from blade.plugins import load
from blade.quantization import choose_form
from blade_native.attention import PagedAttention
from blade_native.reference import TorchOps

Q8_0 = gguf.GGMLQuantizationType.Q8_0
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
BLOCKS = {f"blk.0.{name}.weight": Q8_0 for name in MATRICES} | {"token_embd.weight": Q8_0}


class GroupedTorch(TorchOps):
    """The torch twin, told to compute on grouped weights in float32."""

    quantized_dtypes = (torch.float32,)


def assembled(model: Path, quantize: str | None = None, ops: TorchOps | None = None) -> Assembly:
    """With torch's op set in place of this machine's."""
    ops = ops or GroupedTorch()
    chosen = choose(Config(model=ModelOptions(model=str(model), quantize=quantize, dtype="float32")), load())
    form = choose_form(chosen.checkpoint, quantize, ops, torch.float32, chosen.plugins)
    return replace(chosen, ops=ops, attention=PagedAttention(ops.device), form=form)


def logits(assembly: Assembly) -> torch.Tensor:
    told: list[int] = []
    model = load_model(assembly, told.append)
    assert sum(told) == assembly.weight_bytes
    ids = [1, 5, 9, 2, 30]
    batch = build_batch(
        Step([Sequence(0, ids, SamplingParams(max_tokens=1), blocks=[0])], [5]), 16, TorchOps().to_device
    )
    return model.forward(batch, assembly.attention.allocate(assembly.kv_spec, 1))


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A GGUF file whose matrices are all in blocks; the embedding is tied."""
    return write_gguf(tmp_path / "blocks.gguf", quantised=BLOCKS)


def test_a_gguf_file_is_served_as_it_is_and_says_so(blocks: Path) -> None:
    stored, floats = assembled(blocks), assembled(blocks, "none")
    assert isinstance(stored.form.quantization, Stored)
    assert stored.form.label == "as in the file (Q8_0)"
    assert stored.weight_bytes == stored.checkpoint.num_bytes
    assert floats.weight_bytes == 4 * stored.checkpoint.num_params
    torch.testing.assert_close(logits(stored), logits(floats), rtol=1e-4, atol=1e-4)
    assert weights_line(stored).startswith("weights 11.3 KiB, as in the file")
    assert "dequantised from the file's 11.3 KiB, as --quantize none asks" in weights_line(floats)


def weights_line(assembly: Assembly) -> str:
    return next(line for line in describe(assembly, assembly.plan_memory()) if line.startswith("weights"))


def test_without_kernels_blocks_are_dequantised_with_a_word(blocks: Path) -> None:
    plain = assembled(blocks, ops=TorchOps())
    assert plain.form.quantization is None
    assert "the device (torch) has no kernels for blocks in float32" in plain.form.label
    assert logits(plain).equal(logits(assembled(blocks, "none")))


@pytest.mark.parametrize(("quantize", "low", "high"), [("int8", 1e-6, 0.03), ("int4", 0.01, 0.4)])
def test_rounding_costs_what_it_should(tiny_llama: Path, quantize: str, low: float, high: float) -> None:
    exact, rounded = assembled(tiny_llama), assembled(tiny_llama, quantize)
    assert exact.form.label == "float32"
    assert rounded.form.label == f"{quantize} by --quantize"
    assert rounded.weight_bytes < exact.weight_bytes / 3.5
    expected, found = logits(exact), logits(rounded)
    assert low < float((found - expected).norm() / expected.norm()) < high


def test_a_gguf_file_is_requantised_when_asked(blocks: Path) -> None:
    form = assembled(blocks, "int8").form
    assert form.label == "int8 by --quantize, made of the file's dequantised blocks"
    assert not isinstance(form.quantization, Stored)


def test_an_unknown_form_names_the_closest() -> None:
    with pytest.raises(
        ConfigError, match=r"--quantize int9: no loaded plugin .* Did you mean 'int[48]'\? Known: int4, int8, none"
    ):
        choose(Config(model=ModelOptions(model="nowhere", quantize="int9")), load())


def test_without_kernels_a_form_that_was_asked_for_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"The device \(torch\) has no kernels for quantised weights\. Leave --quantize out"
    ):
        load_model(assembled(tiny_llama, "int8", TorchOps()))
    with pytest.raises(ConfigError, match="Leave --quantize out"):
        _ = assembled(tiny_llama, "int8", TorchOps()).weight_bytes


def quantised_checkpoint(tiny_llama: Path, folder: Path, method: str | None) -> Path:
    shutil.copytree(tiny_llama, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    return folder


def test_a_checkpoint_quantised_by_a_method_nobody_reads(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantised by 'int8', which no loaded plugin reads"):
        assembled(quantised_checkpoint(tiny_llama, tmp_path / "m", "int8"))  # blade's own int8 reads no files
    with pytest.raises(CheckpointError, match="n has a quantization_config without quant_method"):
        assembled(quantised_checkpoint(tiny_llama, tmp_path / "n", None))


class Readers:
    """Stands for the plugins: one reads files of `method`."""

    plain = False

    def registry(self, hook: str) -> Any:
        return self

    def __iter__(self) -> Any:
        return iter(["method"])

    def entry(self, name: str) -> Any:
        return self

    def create(self, name: str, config: dict[str, Any]) -> Any:
        return config


def test_a_quantised_checkpoint_is_not_quantised_again(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = assembled(tiny_llama).checkpoint
    config = {**checkpoint.config, "quantization_config": {"quant_method": "method", "bits": 4}}
    checkpoint = replace(checkpoint, config=config)
    plugins: Any = Readers()
    form = choose_form(checkpoint, None, TorchOps(), torch.float32, plugins)
    assert (form.quantization, form.label) == (config["quantization_config"], "method")
    with pytest.raises(ConfigError, match=r"quantised by 'method' already.*Leave --quantize out"):
        choose_form(checkpoint, "int8", TorchOps(), torch.float32, plugins)
