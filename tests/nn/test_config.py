"""config.json is taken as it is meant, or refused by the key that is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from blade import CheckpointError, DualChunks
from blade.nn import DecoderConfig, DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope
from blade.nn.dual_chunks import sharpness

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LONG = {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [4.0] * 8}
SHORTER = {"original_max_position_embeddings": 64}


def read(**settings: Any) -> DecoderConfig:
    return DecoderConfig.read(PLAIN | settings)


def test_what_is_absent_has_the_default_of_transformers() -> None:
    config = read(head_dim=None, rope_scaling=None)
    assert (config.num_kv_heads, config.head_dim, config.max_context) == (4, 16, 512)
    assert (config.rms_norm_eps, config.tied, config.qk_norm) == (1e-6, False, False)
    assert config.rope == Rope(theta=10000.0, rotary_dim=16, trained_context=512)
    assert config.windows == (None,) * 4


@pytest.mark.parametrize(
    ("settings", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5, 16, 512)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5, 16, 512)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, Rope(5e5, 16, 512)),
        ({"rope_theta": 7, "rope_parameters": {"rope_theta": 5e5}}, Rope(5e5, 16, 512)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, LinearRope(5e5, 16, 512, 2.0)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.5}}, DynamicRope(1e4, 16, 512, 2.5)),
        ({"rope_scaling": LLAMA3}, Llama3Rope(1e4, 16, 512, 8.0, 1.0, 4.0, 512)),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
            Llama3Rope(1e4, 16, 512, 8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}, "original_max_position_embeddings": 32},
            Llama3Rope(1e4, 16, 512, 8.0, 1.0, 4.0, 32),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1, "original_max_position_embeddings": 128}},
            YarnRope(1e4, 16, 512, 1.0, 128, 32.0, 1.0, True, 1.0),
        ),
        ({"partial_rotary_factor": 0.5}, Rope(1e4, 8, 512)),
    ],
)
def test_ropes_new_and_legacy(settings: dict[str, Any], rope: Rope) -> None:
    assert read(**settings).rope == rope


def test_dual_chunks() -> None:
    """As Qwen2.5-1M has them, whose sparse attention is passed over."""
    told: dict[str, Any] = {
        "chunk_size": 256,
        "local_size": 32,
        "original_max_position_embeddings": 300,
        "sparse_attention_config": [{"0": ["vertical_and_slash", 500, 700, 0.9]}],
    }
    config = read(dual_chunk_attention_config=told)
    assert (config.dual_chunks, config.max_context, config.sharpened_after) == (DualChunks(224, 256), 512, 300)
    assert config.chunks == config.dual_chunks
    assert config.rope_table().shape == (257, 16)
    within = replace(config, max_context=257)  # no key is farther than that, as without chunks
    assert within.chunks is None
    assert torch.equal(within.rope_table(), config.rope_table())
    config = read(dual_chunk_attention_config={"chunk_size": 64, "local_size": 60})
    assert (config.dual_chunks, config.sharpened_after) == (DualChunks(4, 7), None)
    assert read().dual_chunks is None


def test_queries_are_sharpened_beyond_what_was_trained_on() -> None:
    found = sharpness(400, 100)
    assert torch.equal(found[:100], torch.ones(100))
    torch.testing.assert_close(found[399], torch.tensor((0.1 * math.log(4) + 1) ** 2))


def test_windows() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 32}
    assert read(**sliding, max_window_layers=3).windows == (None, None, None, 32)
    assert read(**sliding, max_window_layers=0).windows == (32,) * 4
    kinds = ["sliding_attention", "full_attention"] * 2
    assert read(**sliding, layer_types=kinds).windows == (32, None, 32, None)
    assert read(layer_types=kinds, sliding_window=32).windows == (None,) * 4  # use_sliding_window rules


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be an integer from 1 to 2147483647, not '64'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 2**20}, "num_hidden_layers must be an integer from 1 to 1024, not 1048576"),
        ({"vocab_size": True}, "vocab_size must be"),
        ({"intermediate_size": 96.0}, "intermediate_size must be"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of the 4 attention heads, not 3"),
        ({"num_attention_heads": 128}, "head_dim must be"),
        ({"num_attention_heads": 2**31 - 1}, "num_attention_heads must be an integer from 1 to 1048576"),
        ({"head_dim": 2**31 - 1}, "head_dim must be an integer from 1 to 262144"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, not 'gelu'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, not nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1"),
        ({"architectures": []}, "architectures must be a list of strings"),
        ({"max_position_embeddings": None}, "config.json has no max_position_embeddings"),
        ({"rope_theta": -1}, "rope_theta must be a positive number"),
        ({"rope_parameters": {"rope_theta": 1}}, "rope_theta must be above 1 and at most 1e+15, not 1"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters must be one rope for all layers"),
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            "rope_parameters.rope_type must be one of default, linear, dynamic, llama3, yarn, longrope, mrope, not",
        ),
        ({"rope_scaling": {"type": "xpos"}}, "rope_scaling.type must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "config.json has no rope_scaling.factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "rope_scaling.factor must be a number from 1"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "rope_scaling.factor must be a number from 1 to 1000000, not 0.5",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "config.json has no rope_scaling.low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "rope_scaling.high_freq_factor must be at least"),
        (
            {"rope_scaling": LONG | {"long_factor": [1.0]}},
            "rope_scaling.long_factor must be a number for each of 8 pairs",
        ),
        (
            {"rope_scaling": LONG | {"short_factor": [0] * 8}},
            "rope_scaling.short_factor must be a list of numbers from",
        ),
        ({"rope_scaling": LONG | {"long_mscale": 1.2}}, "rope_scaling.long_mscale must be absent"),
        ({"dual_chunk_attention_config": {"chunk_size": 64}}, "has no dual_chunk_attention_config.local_size"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}},
            "local_size must be less than chunk_size",
        ),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 2}, "use_sliding_window": True},
            "use_sliding_window must be false beside dual_chunk_attention_config, not True",
        ),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be"),
        ({"partial_rotary_factor": 1e308}, "partial_rotary_factor must be"),
        ({"head_dim": 15}, "partial_rotary_factor must be"),
        ({"use_sliding_window": True}, "config.json has no sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types must be"),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["linear"] * 4}, "layer_types must be"),
        ({"hidden_act": "x" * 10**6}, "hidden_act must be"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(**settings)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200
