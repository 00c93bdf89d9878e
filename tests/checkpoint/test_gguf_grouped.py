"""GGUF's blocks as grouped weights: nothing is lost, and the twin's numbers are GGML's own."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from blade.checkpoint.gguf import GGMLType
from blade.checkpoint.gguf import grouped as gguf_grouped
from blade.checkpoint.gguf.grouped import grouped
from blade.checkpoint.open import open_checkpoint
from blade.nn import dequantize

from .test_dequant import BLOCKED, raw_blocks, reference
from .writers import tensors, write_gguf

GROUPS = {
    **dict.fromkeys((GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q6_K), 16),
    **dict.fromkeys((GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.Q1_0), 128),
}  # 32 otherwise
RANGES = {  # of q; the whole of its bits otherwise
    GGMLType.Q2_K: (0, 3),
    GGMLType.Q3_K: (4, 11),
    GGMLType.TQ1_0: (7, 9),
    GGMLType.TQ2_0: (7, 10),
    GGMLType.Q1_0: (7, 9),
}


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
def test_dequantised_they_equal_the_reference(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_grouped, "CHUNK", 16 * kind.block_size)  # 111 blocks: six whole chunks and a short one
    raw = raw_blocks(kind, 37, 3)
    weight = grouped(kind, torch.from_numpy(raw))
    assert (weight.bits, weight.group) == (kind.bits, GROUPS.get(kind, 32))
    assert weight.q.shape == (37, 3 * kind.block_size)
    assert weight.q.dtype == torch.uint8
    assert (int(weight.q.min()), int(weight.q.max())) == RANGES.get(kind, (0, 2**weight.bits - 1))
    assert all(tensor.is_contiguous() for tensor in (weight.q, weight.scales))
    others = (weight.scales, weight.minima, weight.block_scales, weight.block_minima)
    num_bytes = weight.q.numel() * weight.bits // 8 + sum(part.nbytes for part in others if part is not None)
    assert num_bytes == 111 * kind.kept_bytes
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
    assert weights.block_labels == ["Q4_0", "Q8_0"]
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


def test_what_is_kept_in_more_bits_is_said(tmp_path: Path) -> None:
    kinds = {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.TQ2_0}
    arrays = {"token_embd.weight": np.ones((40, 256), np.float32), "blk.0.ffn_up.weight": np.ones((4, 256), np.float32)}
    weights = open_checkpoint(write_gguf(tmp_path / "m.gguf", arrays=arrays, quantised=kinds)).blocks
    assert weights is not None
    assert weights.block_labels == ["TQ2_0 in 4.13 bits"]
