"""Adapters over GGUF files, whose tensors are in other orders and pieces than those that PEFT has adapted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from blade.checkpoint.peft import read_adapter

from .conftest import write_adapter
from .test_generation import prepare
from .test_kinds import CASES, EXPECTED, FIXTURES, logits
from .to_gguf import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    write_gguf(FIXTURES / case, path)
    original, prepared = (prepare(place, lora=("a=b",)) for place in (FIXTURES / case, path))
    torch.testing.assert_close(logits(prepared, None)[0], logits(original, None)[0], rtol=1e-5, atol=1e-5)
    adapter = prepared[2].make("x", read_adapter(FIXTURES / case))
    torch.testing.assert_close(logits(prepared, adapter)[0], EXPECTED[case], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_over_blocks(case: str, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    write_gguf(FIXTURES / case, path, in_blocks=True)
    original, rounded = (prepare(place, lora=("a=b",)) for place in (FIXTURES / case, path))
    (found,) = logits(rounded, rounded[2].make("x", read_adapter(FIXTURES / case)))
    lost = distance(logits(rounded, None)[0], logits(original, None)[0])  # by rounding
    assert distance(found, EXPECTED[case]) < 2 * lost < 0.3


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_an_update_and_its_lengths_of_rows_that_lie_in_two_tensors(tmp_path: Path) -> None:
    """DoRA says the same as over the model that has them in one."""
    base, name = FIXTURES / "qwen3-next", "model.layers.0.linear_attn.in_proj_qkvz"
    write_gguf(base, tmp_path / "base.gguf")
    write_adapter(tmp_path / "dora", {name: (96, 32)}, use_dora=True)
    path = tmp_path / "dora" / "adapter_model.safetensors"
    lengths = {f"base_model.model.{name}.lora_magnitude_vector": torch.rand(96) + 0.5}
    save_file(load_file(path) | lengths, path)
    found = []
    for place in (base, tmp_path / "base.gguf"):
        prepared = prepare(place, lora=("a=b",))
        found.append(logits(prepared, prepared[2].make("x", read_adapter(tmp_path / "dora")))[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert distance(logits(prepared, None)[0], found[0]) > 0.1
