"""Adapter files: read, or refused in one sentence that names what is wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blade.checkpoint.peft import read_adapter
from blade.errors import CheckpointError

from .conftest import write_adapter

if TYPE_CHECKING:
    from pathlib import Path

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q: (12, 8), DOWN: (8, 20)}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"self_attn.q_proj": 2, "proj": 100}}, 0.5),
        ({"alpha_pattern": {"down_proj": 2}}, 2.0),
    ],
)
def test_updates_and_their_scale(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    written = write_adapter(tmp_path, SHAPES, **settings)
    found = read_adapter(tmp_path)
    assert found.keys() == written.keys()
    for prefix, (a, b) in written.items():
        assert torch.equal(found[prefix].a, a)
        assert torch.equal(found[prefix].b, b)
    assert found[Q].scale == scale


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not served"),
        ({"use_dora": True}, "has no lora_magnitude_vector; use_dora is True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not served"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is not served"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not served"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not served"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not served"),
        ({"alpha_pattern": {".*q_proj": 2}}, "the pattern .* in alpha_pattern is not served"),
        ({"r": 8}, "is of rank 4; by adapter_config.json it would be 8. Fetch both files again"),
        ({"r": 8, "rank_pattern": {"q_proj": 2}}, "is of rank 4; by adapter_config.json it would be 2 or 8"),
        ({"lora_alpha": "much"}, "Expected `float`, got `str`"),
        ({"r": None}, "Expected `int`, got `null`"),
    ],
)
def test_kinds_that_are_more_than_updates_of_linears(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_adapter(tmp_path, SHAPES, **settings)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path)


def test_updates_of_the_embedding_and_the_head(tmp_path: Path) -> None:
    """Beside them PEFT saves the model's own tensors."""
    shapes = {"model.embed_tokens": (8, 30), "lm_head": (30, 8)}
    written = write_adapter(tmp_path, shapes)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for prefix in shapes:
        tensors[f"base_model.model.{prefix}.base_layer.weight"] = torch.ones(30, 8)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = read_adapter(tmp_path)
    assert {prefix: update.of_table for prefix, update in found.items()} == {
        "model.embed_tokens": True,
        "lm_head": False,
    }
    for prefix, (a, b) in written.items():
        assert torch.equal(found[prefix].a, a)
        assert torch.equal(found[prefix].b, b)


def matrix(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensor"),
        ({f"base_model.model.{Q}.lora_A.weight": matrix(2, 8)}, "has lora_A alone"),
        ({f"base_model.model.{Q}.lora_A.weight": matrix(8)}, "is no part of a linear's update"),
        ({f"base_model.model.{Q}.lora_A.weight": matrix(2, 8).int()}, "is no part of a linear's update"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": matrix(2, 8)}, "is no part of a linear's update"),
        ({f"{Q}.weight": matrix(2, 8)}, "is no part of a linear's update"),
        ({f"base_model.model.{Q}.base_layer.weight": matrix(2, 8)}, "is no part of a linear's update"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": matrix(2, 8)}, "has lora_embedding_A alone"),
        (
            {
                f"base_model.model.{Q}.lora_A.weight": matrix(2, 8),
                f"base_model.model.{Q}.lora_A.default.weight": matrix(2, 8),
            },
            "comes twice",
        ),
        (
            {
                f"base_model.model.{Q}.lora_A.weight": matrix(2, 8),
                f"base_model.model.{Q}.lora_B.weight": matrix(12, 3),
            },
            r"has lora_A \[2, 8\] and lora_B \[12, 3\]",
        ),
    ],
)
def test_tensors_that_are_no_adapter(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    write_adapter(tmp_path, SHAPES)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path)


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors\. blade reads no pickles"):
        read_adapter(tmp_path)


def test_a_cut_file(tmp_path: Path) -> None:
    write_adapter(tmp_path, SHAPES)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_adapter(tmp_path)
