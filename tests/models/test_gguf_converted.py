"""Files that llama.cpp's own converter made (make_gguf_fixtures.py): the logits are those of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import Reference
from safetensors.torch import load_file
from stepper import Stepper, all_together

from blade.checkpoint.open import Checkpoint, open_checkpoint
from blade.nn import dequantize
from blade_native import cpu_ops

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.gguf"))


def opened(name: str) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    return open_checkpoint(FIXTURES / f"{name}.gguf"), load_file(FIXTURES / f"{name}.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_the_original(name: str) -> None:
    checkpoint, kept = opened(name)
    weights: Any = checkpoint.weights
    reference = Reference(checkpoint.config, weights, [kept["prompt"].tolist()], [kept["logits"]])
    (found,) = Stepper(reference).run(all_together([len(kept["prompt"])], seed=0))
    assert float(kept["logits"].std()) > 0.05
    torch.testing.assert_close(found, kept["logits"], rtol=0, atol=2e-5)


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
