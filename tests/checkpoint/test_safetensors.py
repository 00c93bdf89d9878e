"""Folders of safetensors: whole, sharded, damaged."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from blade.checkpoint.gguf import read_gguf
from blade.checkpoint.safetensors import SafetensorsWeights, read_header
from blade.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.int64),
}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(folder: Path, header: Any, data: bytes = bytes(8)) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def write_shards(folder: Path, index: dict[str, str]) -> None:
    for file in set(index.values()):
        save_file({name: TENSORS[name] for name, where in index.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def check(weights: SafetensorsWeights) -> None:
    assert sorted(weights.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert weights.shape(name) == tuple(tensor.shape)
        found = weights.get(name)
        assert found.dtype == tensor.dtype
        assert found.equal(tensor)
    assert weights.num_params == 12 + 5 + 1
    assert weights.num_bytes == 48 + 10 + 8


def test_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = SafetensorsWeights(tmp_path)
    check(weights)
    assert weights.get("a").data_ptr() == weights.get("a").data_ptr()  # mapped, not copied
    assert weights.get("a", torch.bfloat16).equal(TENSORS["a"].bfloat16())


def test_sharded(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    save_file({"d": torch.ones(1)}, tmp_path / "other.safetensors")
    check(SafetensorsWeights(tmp_path))


def test_several_without_an_index(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "x.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "y.safetensors")
    check(SafetensorsWeights(tmp_path))
    save_file({"a": TENSORS["a"]}, tmp_path / "z.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in .*x\.safetensors and again in .*z\.safetensors"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": ENTRY | {"data_offsets": [0, 16], "shape": [4]}}, "truncated: the tensor 'a' ends at byte"),
        ({"a": ENTRY | {"shape": [3]}}, "'a' of F32 [3] cannot take 8 bytes"),
        ({"a": ENTRY | {"shape": [2**62, 2**62]}}, "cannot take 8 bytes"),
        ({"a": ENTRY | {"shape": [-1]}}, "header of the tensor 'a' is not sound"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "cannot take -8 bytes"),
        ({"a": ENTRY | {"dtype": "F31"}}, "of type 'F31', which blade does not read"),
        ({"a": {"dtype": "F32"}}, "header of the tensor 'a' is not sound"),
        ({"a": [1]}, "header of the tensor 'a' is not sound"),
        ({"a": ENTRY, "b": ENTRY}, "'a' and 'b' overlap"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b"[]", "holds no JSON object"),
        (b"{", "is not sound JSON"),
        (b"\xff" * 8, "is not sound JSON"),
        (b"[" * 100_000, "is not sound JSON"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "truncated"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "4 of its bytes belong to no tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsound_headers(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path, header)
    with pytest.raises(CheckpointError) as error:
        SafetensorsWeights(tmp_path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("data", [b"", b"abc", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + bytes(50)])
def test_absurd_header_lengths(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="no sound safetensors file"):
        read_header(path)


def test_pointers_of_git_lfs(tmp_path: Path) -> None:
    for name, read in (("model.safetensors", read_header), ("model.gguf", read_gguf)):
        (path := tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n")
        with pytest.raises(CheckpointError, match=rf"{name} is not the file itself .* run `git lfs pull`"):
            read(path)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "model.safetensors"
    save_file(TENSORS, path)
    mutated = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(mutated[: data.draw(st.sampled_from([len(mutated), len(mutated) - 1, len(mutated) // 2]))])
    with suppress(CheckpointError):
        weights = SafetensorsWeights(folder)
        for name in weights.names():
            weights.get(name)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "is not in its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is not in its folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks gone.safetensors, the file of 'a'"),
        ({"weight_map": {"z": "one.safetensors"}}, "one.safetensors has no tensor 'z'"),
        ({"weight_map": ["a"]}, "weight_map is not sound"),
        ({}, "weight_map is not sound"),
    ],
)
def test_unsound_indices(tmp_path: Path, index: dict[str, Any], message: str) -> None:
    write_shards(tmp_path, {"a": "one.safetensors"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        SafetensorsWeights(tmp_path)
    assert message in str(error.value)


def test_missing_tensor(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor 'z'"):
        SafetensorsWeights(tmp_path).get("z")
