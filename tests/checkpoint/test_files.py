"""What lies in a model's folder under a file's name, but is none, or none of that kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blade.checkpoint.open import open_checkpoint
from blade.checkpoint.peft import read_adapter
from blade.errors import CheckpointError, shown
from blade.text.tokenizer import load_tokenizer


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize("make", [make_pipe, make_device, make_folder])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(
    name: str, make: Callable[[Path], None], tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    make(tmp_path / "model" / name)
    with pytest.raises(CheckpointError, match=rf"model/{name} is no file\."):
        open_checkpoint(tmp_path / "model")


def test_a_loop_of_links(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.symlink_to(path.name)
    open_checkpoint(tmp_path / "model")  # as if there were none
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path / "model")


def test_an_adapter_that_is_no_file(tmp_path: Path) -> None:
    make_pipe(tmp_path / "adapter_config.json")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path)


def test_names_longer_than_any_files(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "a.safetensors")
    index = {"weight_map": {"a": "x" * 5000}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model lacks xx+ \.\.\. xx+, the file of 'a' by"):
        open_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path / ("x" * 5000))
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_file_larger_than_any_of_its_kind(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    with (tmp_path / "model" / name).open("wb") as file:
        file.truncate(20 << 30)  # without taking any of it
    read = open_checkpoint if name == "config.json" else load_tokenizer
    with pytest.raises(CheckpointError, match=rf"{name} has 21474836480 bytes, of which blade reads 134217728 at most"):
        read(tmp_path / "model")


def test_what_an_error_quotes_of_a_file_is_harmless() -> None:
    assert shown("a\x1b[31m\u202e\nö") == r"a\x1b[31m\u202e" r"\nö"
    text = str(CheckpointError("x" * 10**5 + " is wrong.", "Do.\n"))
    assert text.endswith("xx is wrong. Do.\\n")
    assert len(text) < 900
