"""What config.json says of models that see, as their makers publish it."""

from __future__ import annotations

from typing import Any

import pytest
from stepper import ARCHITECTURES

from blade import CheckpointError
from blade.nn import DecoderConfig, Llama3Rope, Rope, YarnRope

ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
QWEN25_VL: dict[str, Any] = {  # Qwen/Qwen2.5-VL-3B-Instruct, what matters
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 128000,
    "max_window_layers": 70, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "vision_config": {"depth": 32, "hidden_size": 1280}, "rope_scaling": ROPE,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3_VL: dict[str, Any] = {  # Qwen/Qwen3-VL-30B-A3B-Instruct
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "text_config": {
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27},
}  # fmt: skip
LLAMA32: dict[str, Any] = {  # meta-llama/Llama-3.2-11B-Vision-Instruct
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 128256,
    "text_config": {
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "tie_word_embeddings": False, "vocab_size": 128256,
    },
}  # fmt: skip


def read(config: dict[str, Any]) -> DecoderConfig:
    found: DecoderConfig = ARCHITECTURES.create(config["architectures"][0]).configure(config)
    return found


def test_keys_side_by_side() -> None:
    config = read(QWEN25_VL)
    assert (config.num_layers, config.head_dim, config.tied, config.qk_norm) == (36, 128, True, False)
    assert config.rope == Rope(1e6, 128, 128000)


def test_the_yarn_that_qwen_recommends_for_long_texts() -> None:
    yarn = {"type": "yarn", "mrope_section": [16, 24, 24], "factor": 4, "original_max_position_embeddings": 32768}
    rope = read(QWEN25_VL | {"rope_scaling": yarn}).rope
    assert isinstance(rope, YarnRope)
    assert rope.max_context == 131072


def test_keys_in_a_section() -> None:
    config = read(QWEN3_VL)
    assert config.rope == Rope(5e6, 128, 262144)
    assert config.qk_norm
    assert config.mixture is not None
    assert (len(config.mixture.layers), config.mixture.num_active, config.mixture.normalize) == (48, 8, True)


def test_layers_that_attend_to_an_image_are_none_of_the_text_model() -> None:
    config = read(LLAMA32)
    assert isinstance(config.rope, Llama3Rope)
    assert (config.num_layers, config.num_kv_layers, len(config.windows)) == (32, 32, 32)
    assert sorted(config.skipped_layers) == [3, 8, 13, 18, 23, 28, 33, 38]
    assert (config.vocab_size, config.extra_rows) == (128256, 8)


@pytest.mark.parametrize(
    ("whole", "keys", "named"),
    [
        (QWEN3_VL, {"num_experts_per_tok": 129}, "text_config.num_experts_per_tok must be at most the 128 experts"),
        (QWEN3_VL, {"rope_scaling": {"rope_type": "x"}}, "text_config.rope_scaling.rope_type must be one of"),
        (LLAMA32, {"cross_attention_layers": [3, 40]}, "text_config.cross_attention_layers must be numbers of some of"),
        (LLAMA32, {"num_hidden_layers": 1, "cross_attention_layers": [0]}, "must be numbers of some of the 1 layers"),
        (LLAMA32, {"cross_attention_layers": "3"}, "text_config.cross_attention_layers must be a list of integers"),
    ],
)
def test_what_is_wrong_is_named(whole: dict[str, Any], keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(whole | {"text_config": whole["text_config"] | keys})
