"""Which folders and files are a checkpoint, and what the others are told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blade.checkpoint.open import open_checkpoint
from blade.errors import CheckpointError


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return folder


def test_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "my-model")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.path, checkpoint.name, checkpoint.format) == (folder, "my-model", "safetensors")
    assert checkpoint.config == {"architectures": ["LlamaForCausalLM"]}
    assert (checkpoint.generation_config, checkpoint.gguf_metadata) == ({}, None)
    assert (checkpoint.num_bytes, checkpoint.num_params) == (16, 4)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert open_checkpoint(folder).generation_config == {"eos_token_id": 7}


def test_the_name_in_the_hub_s_cache(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models--some--model-1.5B" / "snapshots" / "0123abcd")
    assert open_checkpoint(folder).name == "some/model-1.5B"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has no config.json. Give a model's folder, a .gguf file"),
        (("a.gguf",), "has no config.json. Name the file: "),
        (("config.json",), "no .safetensors file is in it. Fetch the whole model"),
        (("config.json", "pytorch_model.bin"), "in pytorch_model.bin: blade reads no pickles"),
        (("config.json", "openvino_model.bin", "openvino_model.xml"), "holds a model made for OpenVINO. Give the one"),
        (("config.json", "model.pt"), "in model.pt: blade reads no pickles"),
        (("config.json", "model.pth"), "convert them with transformers"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1, "a": 2}', "\x00", '{"a": ["\\udc00"]}'])
def test_broken_config(tmp_path: Path, content: str) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (is not sound JSON|holds no JSON object)"):
        open_checkpoint(folder)


def test_neither_folder_nor_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    for path in (tmp_path / "model.bin", tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=r"neither a folder nor a \.gguf file"):
            open_checkpoint(path)
