"""config.json's words on dual chunk attention (An et al. 2024), with which Qwen2.5-1M reads four times what it was
trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.types import DualChunks

if TYPE_CHECKING:
    from torch import Tensor

    from blade.nn.keys import Keys


def read_dual_chunks(config: Keys) -> tuple[DualChunks | None, int | None]:
    """The chunks, and after how many tokens queries are sharpened; None where config.json says nothing. Raises
    CheckpointError naming the key that is missing or wrong. What it says of sparse attention is passed over: that
    leaves keys out, to be faster."""
    if not config.has("dual_chunk_attention_config"):
        return None, None
    keys = config.section("dual_chunk_attention_config")
    size, local = keys.integer("chunk_size"), keys.integer("local_size", minimum=0)
    if local >= size:
        keys.refuse("local_size", f"less than chunk_size, {size}")
    if config.flag("use_sliding_window", False):
        config.refuse("use_sliding_window", "false beside dual_chunk_attention_config")
    length, trained = size - local, "original_max_position_embeddings"
    chunks = DualChunks(length, farthest=min(size, 2 * length - 1))
    return chunks, keys.integer(trained) if keys.has(trained) else None


def sharpness(num_tokens: int, trained: int) -> Tensor:
    """What the query of each token is multiplied by, [num_tokens] float32.

    Scores are to be (0.1 ln(s) + 1)^2 times as large in a context of s times what was trained on (YaRN, Peng et al.
    2023), and as they are within it. vLLM takes a prompt's whole length for all its tokens, and has half of the factor
    in the keys; here the length is what the query sees, so that neither chunks of a prompt nor the prompts that a
    prefix goes on in change what is kept.
    """
    lengths = torch.arange(1, num_tokens + 1, dtype=torch.float32)
    return (0.1 * (lengths / trained).clamp(min=1).log() + 1).square()
