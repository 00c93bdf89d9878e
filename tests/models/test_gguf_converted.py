"""Files that llama.cpp's own converter made (make_gguf_fixtures.py): the logits are those of the original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import Reference
from gguf_mutations import content_of, serve, written
from safetensors.torch import load_file
from stepper import Stepper, all_together

from blade import CheckpointError
from blade.checkpoint.open import Checkpoint, open_checkpoint
from blade.nn import dequantize
from blade_native import cpu_ops

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.gguf"))


def opened(name: str) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    return open_checkpoint(FIXTURES / f"{name}.gguf"), load_file(FIXTURES / f"{name}.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_the_original(name: str) -> None:
    check_logits(*opened(name))


def check_logits(checkpoint: Checkpoint, kept: dict[str, torch.Tensor]) -> None:
    weights: Any = checkpoint.weights
    reference = Reference(checkpoint.config, weights, [kept["prompt"].tolist()], [kept["logits"]])
    (found,) = Stepper(reference).run(all_together([len(kept["prompt"])], seed=0))
    assert float(kept["logits"].std()) > 0.05
    torch.testing.assert_close(found, kept["logits"], rtol=0, atol=2e-5)


def test_gates_and_ups_of_experts_may_be_one_tensor(tmp_path: Path) -> None:
    """As the converter writes them when asked to."""
    content, (_, kept) = content_of("qwen35moe"), opened("qwen35moe")
    for i in range(4):
        gate, up = (content.tensors.pop(f"blk.{i}.ffn_{name}_exps.weight") for name in ("gate", "up"))
        num_experts, inner, width = gate.shape
        both = [np.frombuffer(part.data, np.uint8).reshape(num_experts, -1) for part in (gate, up)]
        data = np.concatenate(both, axis=1).tobytes()
        content.tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = replace(
            gate, shape=(num_experts, 2 * inner, width), data=data
        )
    path = tmp_path / "fused.gguf"
    path.write_bytes(written(content))
    check_logits(open_checkpoint(path), kept)


def test_the_first_converters_of_qwen3_next_left_its_rows_in_groups(tmp_path: Path) -> None:
    content, (_, kept) = content_of("qwen3next"), opened("qwen3next")
    for i in range(3):
        qkv, z = (content.tensors.pop(f"blk.{i}.attn_{name}.weight") for name in ("qkv", "gate"))
        q, k, v = np.split(np.frombuffer(qkv.data, np.uint16).reshape(qkv.shape), [16, 32])
        parts = [part.reshape(2, -1, 32) for part in (q, k, v, np.frombuffer(z.data, np.uint16))]  # of each key head
        data = np.concatenate(parts, axis=1).tobytes()
        content.tensors[f"blk.{i}.ssm_in.weight"] = replace(qkv, shape=(160, 32), data=data)
    path = tmp_path / "grouped.gguf"
    path.write_bytes(written(content))
    check_logits(open_checkpoint(path), kept)


def test_heads_that_predict_further_tokens_are_told_from_layers() -> None:
    checkpoint, kept = opened("qwen35")
    heads = {name for name in kept if name.startswith("mtp.")}
    assert heads == {name for name in checkpoint.weights.names() if name.startswith("mtp.")}
    assert checkpoint.config["num_hidden_layers"] == 4
    for name in heads:
        found = checkpoint.weights.get(name, torch.float32)
        torch.testing.assert_close(found, kept[name].float(), rtol=0, atol=1e-6)


def test_columns_in_blocks_say_which_features_they_multiply(tmp_path: Path) -> None:
    """The value heads of Qwen3.5 lie in another order, and a block of 32 numbers is of two of them."""
    name, stored = "model.layers.0.linear_attn.out_proj.weight", "blk.0.ssm_out.weight"
    exact, _ = opened("qwen35")
    weights = open_checkpoint(requantised("qwen35", stored, tmp_path / "blocks.gguf")).blocks
    assert weights is not None
    weight, blocks = weights.grouped(name), weights.blocks(name)
    assert weight.order is not None
    assert blocks.order is not None
    assert weight.order.equal(blocks.order)
    found = dequantize(weight, torch.float32)
    assert found.equal(weights.get(name))
    torch.testing.assert_close(found, exact.weights.get(name, torch.float32), rtol=0, atol=0.01)
    x = torch.randn(3, found.shape[1])
    linear = cpu_ops(None).blocks_linear([blocks], None)
    want = x @ found.T
    assert linear is None or float((linear(x) - want).norm() / want.norm()) < 0.02


def requantised(name: str, tensor: str, path: Path) -> Path:
    """The fixture with one of its tensors in Q8_0."""
    reader, writer = gguf.GGUFReader(FIXTURES / f"{name}.gguf"), gguf.GGUFWriter(path, name)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = [*field.types, None]
            writer.add_key_value(key, field.contents(), kinds[0], kinds[1])
    for each in reader.tensors:
        array, kind = each.data, each.tensor_type
        if each.name == tensor:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(gguf.quants.dequantize(each.data, each.tensor_type), kind)
        writer.add_tensor(each.name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qwen35.nextn_predict_layers", 5, "must be less than the 5 layers there are, not 5"),
        ("qwen35.ssm.time_step_rank", 3, "must be a multiple of the 2 key heads of ssm.group_count, not 3"),
        ("qwen35.ssm.inner_size", 63, "must be a multiple of the 4 value heads of ssm.time_step_rank, not 63"),
        ("qwen35.ssm.state_size", None, "has no key qwen35.ssm.state_size"),
        ("qwen35.attention.recurrent_layers", [1], "must be a list of bool, not"),
        ("qwen35.attention.recurrent_layers", [True], "layer_types must be linear_attention or full_attention"),
        ("llama4.attention.sliding_window", 0, "must be above 0: models without chunks are not served, not 0"),
    ],
)
def test_metadata_is_checked(tmp_path: Path, key: str, value: object, message: str) -> None:
    content, path = content_of(key.partition(".")[0]), tmp_path / "broken.gguf"
    content.metadata[key] = value
    if value is None:
        del content.metadata[key]
    path.write_bytes(written(content))
    with pytest.raises(CheckpointError) as error:
        serve(path)
    assert message in str(error.value)


def test_decays_are_checked(tmp_path: Path) -> None:
    content, path = content_of("qwen35"), tmp_path / "broken.gguf"
    content.tensors["blk.0.ssm_a"] = replace(content.tensors["blk.0.ssm_a"], data=bytes(16))
    path.write_bytes(written(content))
    with pytest.raises(CheckpointError, match=r"A_log of the GGUF file \(ssm_a\) must hold numbers below 0"):
        serve(path)
