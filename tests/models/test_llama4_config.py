"""What config.json says of a Llama 4."""

from __future__ import annotations

from typing import Any

import pytest

from blade import CheckpointError
from blade_llama.llama4 import Llama4

SCOUT: dict[str, Any] = {  # of meta-llama/Llama-4-Scout-17B-16E-Instruct, what matters
    "architectures": ["Llama4ForConditionalGeneration"],
    "text_config": {
        "attention_chunk_size": 8192, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760, "no_rope_layers": [], "num_attention_heads": 40,
        "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "use_qk_norm": True, "vocab_size": 202048,
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    },
}  # fmt: skip


def changed(**keys: Any) -> dict[str, Any]:
    return SCOUT | {"text_config": SCOUT["text_config"] | keys}


def test_layers_attend_within_chunks_or_know_no_positions() -> None:
    config = Llama4().configure(SCOUT)
    assert (config.max_context, config.attention_chunk) == (10485760, 8192)
    assert sorted(set(range(48)) - config.rotary_layers) == list(range(3, 48, 4))
    assert config.chunked_layers == config.rotary_layers
    assert config.mixture is not None
    assert len(config.mixture.layers) == 48


def test_layers_may_attend_to_all() -> None:
    kinds = ["full_attention", "chunked_attention"] * 24
    assert Llama4().configure(changed(layer_types=kinds)).chunked_layers == frozenset(range(1, 48, 2))
    assert Llama4().configure(changed(layer_types=["full_attention"] * 48)).attention_chunk is None


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (
            {"head_dim": 127, "rope_scaling": {"partial_rotary_factor": 126.5 / 127}},
            "text_config.head_dim must be even",
        ),
        ({"no_rope_layers": [1, 0]}, "text_config.no_rope_layers"),
        ({"num_experts_per_tok": 17}, "text_config.num_experts_per_tok"),
        ({"layer_types": ["sliding_attention"] * 48}, "text_config.layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "text_config.rope_scaling"),
    ],
)
def test_what_is_not_served_is_named(keys: dict[str, Any], named: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    with pytest.raises(CheckpointError, match=named):
        Llama4().configure(changed(**{"rope_scaling": rope} | keys))
