"""What is mapped can be let go of, and comes back."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from blade.checkpoint.mapping import let_go, map_file
from blade.checkpoint.open import open_checkpoint
from blade.checkpoint.safetensors import SafetensorsWeights

from .writers import write_gguf

PAGES = 64


def resident(path: Path) -> int:
    """Bytes of the file in this process's memory."""
    maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return 1024 * sum(int(re.search(r"^Rss: +(\d+) kB", rest, re.M)[1]) for rest in maps)  # type: ignore[index]


def touch(memory: mmap.mmap) -> int:
    return sum(memory[7 :: mmap.PAGESIZE])


def test_whole_pages_leave_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (PAGES * mmap.PAGESIZE // 256))
    memory = map_file(path)
    total = touch(memory)
    assert resident(path) == PAGES * mmap.PAGESIZE
    let_go(memory, 100, 2 * mmap.PAGESIZE - 100)  # no whole page
    assert resident(path) == PAGES * mmap.PAGESIZE
    let_go(memory, 100, len(memory))
    assert resident(path) == mmap.PAGESIZE
    assert touch(memory) == total


def test_released_tensors_are_given_anew(tmp_path: Path) -> None:
    tensor = torch.arange(100_000, dtype=torch.int32).view(100, -1)
    save_file({"a": tensor, "b": tensor + 1}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    assert weights.get("a").equal(tensor)
    before = resident(tmp_path / "model.safetensors")
    weights.release(["a"])
    assert resident(tmp_path / "model.safetensors") < before - 300_000
    assert weights.get("a").equal(tensor)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32])
def test_released_blocks_are_given_anew(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights = open_checkpoint(write_gguf(tmp_path / "m.gguf", quantised={"blk.0.ffn_up.weight": kind})).weights
    before = weights.get(name).clone()
    weights.release([name])
    assert weights.get(name).equal(before)
