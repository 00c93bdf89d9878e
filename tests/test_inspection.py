"""`blade inspect` as its user meets it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from blade.cli import main
from blade.inspection import _bytes_read, _speed
from blade.testing import TensorWeights

if TYPE_CHECKING:
    from pathlib import Path


def inspected(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", *args, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_a_folder_holds_and_what_it_needs(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    found = inspected(capsys, str(tiny_llama), "--dtype", "float32", "--max-model-len", "64")
    served = found["served"]
    assert found["problem"] is None
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert served["plugin"] == "llama"
    assert served["num_layers"] == config["num_hidden_layers"]
    assert served["weight_bytes"] == 4 * found["num_params"]
    token_bytes = 2 * served["num_layers"] * served["num_kv_heads"] * served["head_dim"] * 4
    assert served["kv_token_bytes"] == token_bytes
    assert served["kv_full_context_bytes"] == 64 * token_bytes
    assert served["state_bytes"] == 0
    assert 0 < served["bytes_per_token"] <= served["weight_bytes"]


def test_the_embedding_is_read_once_or_not_at_all(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = inspected(capsys, str(smollm2_gguf), "--dtype", "bfloat16", "--quantize", "none")["served"]
    assert served["bytes_per_token"] == served["weight_bytes"]  # tied: it is the output matrix
    assert served["tokens_per_second"] is None or served["tokens_per_second"] > 1
    assert served["margin"] is None or 0.15 <= served["margin"] <= 0.5


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("model.embed_tokens._weight_qdata", "lm_head._weight_qdata"),
        ("transformer.wte.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ],
)
def test_of_an_embedding_beside_the_output_matrix_a_token_reads_one_row(embedding: str, head: str) -> None:
    numbers = {embedding: 100, head: 30, "model.layers.0.mlp.up_proj.weight": 7}
    assembly: Any = SimpleNamespace(
        weights=TensorWeights({name: torch.zeros(num, 2) for name, num in numbers.items()}),
        checkpoint=SimpleNamespace(config={}),
        form=SimpleNamespace(quantization=None),
        ops=None,
        dtype=torch.bfloat16,
    )
    assert _bytes_read(assembly) == (2 * 2 * (30 + 7),) * 2
    assembly.weights = TensorWeights({name: torch.zeros(num, 2) for name, num in numbers.items() if head not in name})
    assert _bytes_read(assembly) == (2 * 2 * (100 + 7),) * 2


def test_what_is_no_weight_makes_an_estimate_less_certain() -> None:
    speed, margin = _speed(num_bytes=10**9, bandwidth=40e9, num_layers=24)
    assert 1 / speed == pytest.approx(1e9 / 34e9 + 24 * 45e-6 + 0.7e-3)
    assert 0.15 < margin < 0.2
    assert 0.3 < _speed(num_bytes=10**8, bandwidth=60e9, num_layers=30)[1] < 0.4


def test_of_experts_a_token_reads_those_that_are_chosen() -> None:
    numbers = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": 8 for i in range(4)} | {"lm_head.weight": 5}
    assembly: Any = SimpleNamespace(
        weights=TensorWeights({name: torch.zeros(num, 2) for name, num in numbers.items()}),
        checkpoint=SimpleNamespace(config={"num_experts": 4, "num_experts_per_tok": 1}),
        form=SimpleNamespace(quantization=None),
        ops=None,
        dtype=torch.bfloat16,
    )
    assert _bytes_read(assembly) == (2 * 2 * (8 + 5), 2 * 2 * (32 + 5))


def test_a_family_that_is_not_served(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_llama, tmp_path / "odd")
    config = json.loads((tiny_llama / "config.json").read_text()) | {"architectures": ["GemmaForCausalLM"]}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(tmp_path / "odd")])
    printed = capsys.readouterr().out
    assert "family   GemmaForCausalLM\n" in printed
    assert "M parameters in" in printed
    assert "problem  odd is a GemmaForCausalLM, which no loaded plugin serves. Served: Llama" in printed


def test_a_context_that_does_not_fit(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(tiny_llama), "--kv-cache-memory", "4096"])
    printed = capsys.readouterr().out
    assert "problem  The KV cache would hold" in printed
    assert "here " not in printed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"vocab_size": 288},
            "Tensor model.embed_tokens.weight in model.safetensors has shape (272, 64); by config.json (vocab_size 288)"
            " it would be (288, 64).",
        ),
        (
            {"num_key_value_heads": 1, "head_dim": 16},
            "Tensor model.layers.0.self_attn.k_proj.weight in model.safetensors has shape (32, 64); by config.json "
            "(num_key_value_heads 1 times head_dim 16, head_dim 16) it would be (16, 64).",
        ),
        (
            {"intermediate_size": 96},
            "Tensor model.layers.0.mlp.gate_proj.weight in model.safetensors has shape (128, 64); by config.json "
            "(intermediate_size 96) it would be (96, 64).",
        ),
    ],
)
def test_tensors_of_another_shape_than_config_json_says(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, int], words: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(folder)])
    assert f"problem  {words}\n" in capsys.readouterr().out
    for stop in (["--dry-run"], ["--port", "0"]):  # a start says the same
        with pytest.raises(SystemExit, match="2"):
            main(["serve", "--model", str(folder), *stop])
        assert f"blade: {words}\n" in capsys.readouterr().err


def test_where_the_tokenizer_is_read_from(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspected(capsys, str(tiny_llama))["tokenizer"] == "tokenizer.json"
    folder = shutil.copytree(tiny_llama, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(folder)])
    printed = capsys.readouterr().out
    assert "text     no tokenizer\n" in printed
    assert "holds no tokenizer.json" in printed
    found = inspected(capsys, str(folder), "--tokenizer-dir", str(tiny_llama))
    assert found["tokenizer"] == f"tokenizer.json in {tiny_llama}"


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err
