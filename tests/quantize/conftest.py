"""A tiny model whose layers are all alike to the algorithms: norms that are not ones, heads that share nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blade.opening import opener
from blade_quantize.command import quantize

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN, HEADS = 64, 4


@pytest.fixture(scope="session")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` with biases, as many heads of keys as of queries, uneven channels, and numbers in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "uneven"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    biases = {"attention_bias": True, "mlp_bias": True}
    config |= {"num_key_value_heads": HEADS, "torch_dtype": "bfloat16"} | biases
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name in list(tensors):
        if name.endswith("norm.weight"):
            tensors[name] = (torch.rand(HIDDEN) * 3 + 0.2) * (0.1 if name == "model.norm.weight" else 1)
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[name] = torch.randn(HIDDEN, HIDDEN) * 0.3
        if name.endswith("_proj.weight"):
            tensors[name.replace("weight", "bias")] = torch.randn(len(tensors[name])) * 0.1
    saved = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text("about the model")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle is copied")
    return folder


@pytest.fixture
def odd(tiny_llama: Path, tmp_path: Path) -> Path:
    """`tiny_llama` with 72 numbers between the matrices of its MLPs, in bfloat16."""
    folder = tmp_path / "odd"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 72}))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if ".mlp." in name:
            tensors[name] = tensors[name][:, :72] if "down_proj" in name else tensors[name][:72]
    saved = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Path, str]]:
    """``blade quantize`` with keyword arguments as options: the new folder, and what was printed. It is measured on a
    text of 300 tokens."""
    evaluate = tmp_path_factory.mktemp("texts") / "evaluate.txt"
    evaluate.write_text("Nobody had asked the clock; it struck all the same. " * 6)

    def call(model: Path | str, out: Path | None = None, **options: Any) -> tuple[Path, str]:
        out = out or tmp_path / "out"
        quantize(str(model), out, device="cpu", **{"evaluate": evaluate} | options, open_model=opener(()))
        return out, capsys.readouterr().out

    return call


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog;",
        "12",
        "+",
        "30",
        "=",
        "42.",
        "Warum?",
    ]
    lines = [json.dumps({"text": " ".join(words[i:] + words[:i])}) for i in range(len(words))]
    path.write_text("\n".join(lines) + "\n")
    return path
