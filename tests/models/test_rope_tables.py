"""Rope tables against transformers' frequencies, at the sizes of real checkpoints and out to their last position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blade.nn import DecoderConfig

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {  # rope, trained context, context the rope reaches
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 4096, 16384),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 4096, 8192),
    "llama3": (LLAMA31, 131072, 131072),
    "llama3 without a blend": (LLAMA31 | {"factor": 16.0, "high_freq_factor": 1.0}, 131072, 131072),
    "yarn": (QWEN_YARN, 32768, 131072),
    "yarn already stretched": (QWEN_YARN | {"factor": 2.0}, 131072, 131072),
    "yarn without factor": ({k: v for k, v in QWEN_YARN.items() if k != "factor"}, 131072, 131072),
    "yarn bounds": (QWEN_YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}, 32768, 131072),
}


@pytest.mark.parametrize("case", CASES)
def test_tables_equal_those_of_transformers(case: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, trained_context, max_context = CASES[case]
    settings = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": trained_context}
    theirs = LlamaConfig(**settings, rope_parameters={"factor": None} | rope)
    config = DecoderConfig.read(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    assert config.max_context == max_context
    table = config.rope.table(max_context)
    assert table.shape == (max_context, 128)
    assert table.dtype == torch.float32
    for position in (0, 1, 77, trained_context - 1, max_context - 1):
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, seq_len=position + 1)
        angles = frequencies.double() * position
        expected = torch.cat((angles.cos(), angles.sin())) * magnitude
        assert float((table[position] - expected).abs().max()) < 1e-6 * (position + 10)


@pytest.mark.parametrize("settings", [{}, {"factor": 8.0}, {"attention_factor": 1.3}], ids=str)
def test_long_ropes_equal_those_of_transformers(settings: dict[str, Any]) -> None:
    """The served context chooses the factors."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
        "short_factor": [1 + i / 100 for i in range(48)], "long_factor": [1 + i for i in range(48)],
    } | settings  # fmt: skip
    sizes = {"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072}
    theirs = LlamaConfig(**sizes, rope_parameters={"factor": None} | rope)
    config = DecoderConfig.read(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    assert config.max_context == 131072
    for served in (4096, 131072):
        frequencies, magnitude = ROPE_INIT_FUNCTIONS["longrope"](theirs, seq_len=served)
        table = config.rope.table(served)
        for position in (0, 1, 4000, served - 1):
            angles = frequencies.double() * position
            expected = torch.cat((angles.cos(), angles.sin())) * magnitude
            assert float((table[position] - expected).abs().max()) < 1e-6 * (position + 10)
