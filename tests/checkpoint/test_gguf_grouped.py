"""GGUF's blocks as grouped weights: nothing is lost, and the twin's numbers are GGML's own."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from blade.checkpoint.gguf import GGMLType
from blade.checkpoint.gguf import grouped as gguf_grouped
from blade.checkpoint.gguf.grouped import grouped
from blade.checkpoint.open import open_checkpoint
from blade.nn import dequantize

from .test_dequant import BLOCKED, raw_blocks, reference
from .writers import tensors, write_gguf

BITS = {"Q4": 4, "Q5": 5, "Q6": 6, "Q8": 8}
GROUPS = {GGMLType.Q6_K: 16}  # 32 otherwise


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
def test_dequantised_they_equal_the_reference(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_grouped, "CHUNK", 16 * kind.block_size)  # 111 blocks: six whole chunks and a short one
    raw = raw_blocks(kind, 37, 3)
    weight = grouped(kind, torch.from_numpy(raw))
    assert (weight.bits, weight.group) == (BITS[kind.name[:2]], GROUPS.get(kind, 32))
    assert weight.q.shape == (37, 3 * kind.block_size)
    assert weight.q.dtype == torch.uint8
    assert int(weight.q.max()) == 2**weight.bits - 1
    assert all(tensor.is_contiguous() for tensor in (weight.q, weight.scales))
    found = dequantize(weight, torch.float32)
    torch.testing.assert_close(found, reference(raw, kind), rtol=0, atol=0, equal_nan=True)


def test_only_matrices_in_blocks_are_grouped(tmp_path: Path) -> None:
    kinds = {
        "blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q4_0,
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "output_norm.weight": gguf.GGMLQuantizationType.Q8_0,
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", quantised=kinds))
    weights = checkpoint.blocks
    assert weights is not None
    assert weights.block_formats == ["Q4_0", "Q8_0"]  # 2,048 and 1,280 numbers
    assert weights.grouped_bytes("model.layers.0.mlp.up_proj.weight") == 64 * 18
    assert weights.grouped_bytes("model.layers.0.mlp.down_proj.weight") is None
    assert weights.grouped_bytes("model.norm.weight") is None
    found = dequantize(weights.grouped("model.embed_tokens.weight"), torch.float32)
    assert found.equal(weights.get("model.embed_tokens.weight"))
    plain = open_checkpoint(write_gguf(tmp_path / "plain.gguf", arrays=tensors("llama")))
    assert plain.blocks is None


def test_rows_that_llama_cpp_reordered_are_put_back(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    kinds = {"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q5_1}
    weights = open_checkpoint(write_gguf(tmp_path / "m.gguf", quantised=kinds)).blocks
    assert weights is not None
    assert dequantize(weights.grouped(name), torch.float32).equal(weights.get(name))
