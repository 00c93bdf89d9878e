"""What a GGUF file says in Hugging Face's words: names, order of rows, configuration."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from blade.checkpoint.gguf import GGMLType
from blade.checkpoint.gguf.weights import GGUFWeights
from blade.checkpoint.open import Checkpoint, open_checkpoint
from blade.errors import CheckpointError

from .writers import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, TOKENS, VOCAB, tensors, write_gguf

Q8_0 = gguf.GGMLQuantizationType.Q8_0
LAYER = "model.layers.0."


def opened(folder: Path, arch: str = "llama", **options: Any) -> Checkpoint:
    return open_checkpoint(write_gguf(folder / "tiny.gguf", arch, **options))


def llama_cpp_order(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """As llama.cpp's converter reorders q and k: halves of a head become neighbours."""
    return rows.view(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def test_names_and_values(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "qwen3")
    assert set(checkpoint.weights.names()) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(LAYER + name for name in ("input_layernorm.weight", "post_attention_layernorm.weight")),
        *(f"{LAYER}self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"{LAYER}mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
    }
    expected = tensors("qwen3")
    for name, source in {
        "self_attn.q_proj": "attn_q",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
    }.items():
        array = expected[f"blk.0.{source}.weight"]
        assert checkpoint.weights.shape(f"{LAYER}{name}.weight") == array.shape
        assert checkpoint.weights.get(f"{LAYER}{name}.weight").equal(torch.from_numpy(array))
    assert checkpoint.num_params == sum(array.size for array in expected.values())
    assert checkpoint.num_bytes == 4 * checkpoint.num_params


def test_dtypes(tmp_path: Path) -> None:
    half = {name: array.astype(np.float16) for name, array in tensors("llama").items()}
    weights = opened(tmp_path, arrays=half, quantised={"output_norm.weight": Q8_0}).weights
    assert weights.get("model.embed_tokens.weight").dtype == torch.float16
    assert weights.get("model.norm.weight").dtype == torch.float32
    assert weights.get("model.norm.weight", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("quantised", [False, True])
def test_rows_of_llama_s_q_and_k_are_put_back(tmp_path: Path, quantised: bool) -> None:
    wanted = {name: torch.from_numpy(array) for name, array in tensors("llama").items()}
    q, k = wanted["blk.0.attn_q.weight"], wanted["blk.0.attn_k.weight"]
    arrays = tensors("llama") | {
        "blk.0.attn_q.weight": llama_cpp_order(q, HEADS).numpy(),
        "blk.0.attn_k.weight": llama_cpp_order(k, KV_HEADS).numpy(),
        "blk.0.attn_q.bias": llama_cpp_order(q[:, 0].clone(), HEADS).numpy(),
    }
    kinds = {name: Q8_0 for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight") if quantised}
    weights = opened(tmp_path, arrays=arrays, quantised=kinds).weights
    tolerance = 0.05 if quantised else 0.0
    for name, expected in {"q_proj.weight": q, "k_proj.weight": k, "q_proj.bias": q[:, 0]}.items():
        found = weights.get(f"{LAYER}self_attn.{name}")
        torch.testing.assert_close(found, expected, rtol=0, atol=0.0 if name.endswith("bias") else tolerance)


@pytest.mark.parametrize("arch", ["qwen2", "qwen2vl", "qwen3", "qwen3vl"])
def test_other_rows_stay(tmp_path: Path, arch: str) -> None:
    weights = opened(tmp_path, arch).weights
    expected = torch.from_numpy(tensors(arch)["blk.0.attn_k.weight"])
    assert weights.get(f"{LAYER}self_attn.k_proj.weight").equal(expected)


def test_raw_blocks(tmp_path: Path) -> None:
    weights = opened(tmp_path, "qwen2", quantised={"blk.0.ffn_down.weight": Q8_0}).weights
    assert isinstance(weights, GGUFWeights)
    kind, raw = weights.raw(f"{LAYER}mlp.down_proj.weight")
    assert kind == GGMLType.Q8_0
    assert raw.shape == (HIDDEN, INTERMEDIATE // 32 * 34)


def test_config(tmp_path: Path) -> None:
    assert opened(tmp_path, "qwen2").config == {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": [2, 0],
    }


@pytest.mark.parametrize(
    ("arch", "architecture"),
    [("qwen2vl", "Qwen2VLForConditionalGeneration"), ("qwen3vl", "Qwen3VLForConditionalGeneration")],
)
def test_a_model_that_sees_has_its_text_model_here(tmp_path: Path, arch: str, architecture: str) -> None:
    seeing = opened(tmp_path, arch, changes={"rope.dimension_sections": [2, 1, 1, 0]})
    reading = opened(tmp_path, arch.removesuffix("vl"))
    names = {"architectures": [architecture], "model_type": arch}
    assert seeing.config == reading.config | names
    assert seeing.weights.names() == reading.weights.names()


def test_an_output_matrix_unties(tmp_path: Path) -> None:
    arrays = tensors("llama") | {"output.weight": np.ones((VOCAB, HIDDEN), np.float32)}
    checkpoint = opened(tmp_path, arrays=arrays)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert not checkpoint.weights.get("lm_head.weight").equal(checkpoint.weights.get("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, [2, 0]),
        ({"tokenizer.ggml.token_type": [1] * VOCAB}, [2]),
        ({"tokenizer.ggml.eot_token_id": 7}, [2, 7, 0]),
        ({"tokenizer.ggml.eos_token_id": None}, [0, 2]),
        ({"tokenizer.ggml.tokens": ["<|eot_id|>", *TOKENS[1:]]}, [2, 0]),
    ],
)
def test_ends_of_text(tmp_path: Path, changes: dict[str, Any], ends: list[int]) -> None:
    assert opened(tmp_path, changes=changes).generation_config["eos_token_id"] == ends


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
        ({"rope.dimension_count": 4}, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_rope(tmp_path: Path, changes: dict[str, Any], rope: dict[str, Any]) -> None:
    assert opened(tmp_path, changes=changes).config["rope_parameters"] == {"rope_theta": 10000.0} | rope


def llama3_factors(factor: float, low: float, high: float, context: int, theta: float, size: int) -> np.ndarray:
    """As llama.cpp's converter computes rope_freqs.weight."""
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope(tmp_path: Path) -> None:
    def with_factors(factors: np.ndarray) -> Checkpoint:
        changes = {"rope.freq_base": 500000.0, "attention.key_length": 64}
        return opened(tmp_path, arrays=tensors("llama") | {"rope_freqs.weight": factors}, changes=changes)

    checkpoint = with_factors(llama3_factors(32.0, 1.0, 4.0, 8192, 500000.0, 64))
    assert checkpoint.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.weights.names()
    four = with_factors(llama3_factors(16.0, 1.0, 1.0, 8192, 500000.0, 64)).config["rope_parameters"]
    assert (four["factor"], four["low_freq_factor"], four["high_freq_factor"]) == (16.0, 1.0, 1.0)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not that of Llama 3"):
        with_factors(llama3_factors(32.0, 1.0, 2.0, 8192, 500000.0, 64))
    for factors in (np.ones(31, np.float32), np.zeros(32, np.float32), np.full(32, np.nan, np.float32)):
        with pytest.raises(CheckpointError, match="not one factor for each pair of 64 channels"):
            with_factors(factors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "gpt9"},
            "architecture 'gpt9', which blade does not know. Known in GGUF files are llama",
        ),
        ({"block_count": None}, "has no key llama.block_count"),
        ({"attention.head_count": 0}, "llama.attention.head_count must be an integer from 1 to 2147483647, not 0"),
        ({"attention.head_count": [4, 4]}, "llama.attention.head_count must be an integer from 1 to 2147483647"),
        ({"attention.layer_norm_rms_epsilon": math.nan}, "rms_epsilon must be a positive number, not nan"),
        ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type must be none, linear or yarn, not 'longrope'"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "tokenizer.ggml.eos_token_id must be an integer"),
        ({"tokenizer.ggml.tokens": 7}, "tokenizer.ggml.tokens must be a list of str"),
    ],
)
def test_metadata_is_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, changes=changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.ssm_in.weight", "'blk.0.ssm_in.weight' belongs to no model that blade knows"),
        ("blk.0.ffn_gate_inp.weight", "holds experts, which blade does not know of 'llama' models"),
        ("blk.00.attn_q.weight", "'blk.00.attn_q.weight' belongs to no model"),
        ("token_embd.weight", "has no tensor token_embd.weight"),
    ],
)
def test_tensors_are_checked(tmp_path: Path, name: str, message: str) -> None:
    arrays = tensors("llama")
    if arrays.pop(name, None) is None:
        arrays[name] = np.ones((HIDDEN, HIDDEN), np.float32)
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, arrays=arrays)
    assert message in str(error.value)


def test_missing_tensors_and_heads_that_do_not_fit(tmp_path: Path) -> None:
    weights = opened(tmp_path, changes={"attention.head_count": 5}).weights
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.9"):
        weights.get("model.layers.9.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"does not divide into 5 heads"):
        weights.get(f"{LAYER}self_attn.q_proj.weight")


@pytest.mark.demo
def test_smollm2(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.num_params == 134_515_008
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["eos_token_id"] == [2, 0]
    check_finite(checkpoint)


@pytest.mark.demo
def test_qwen(qwen_gguf: Path) -> None:
    checkpoint = open_checkpoint(qwen_gguf)
    assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]
    assert checkpoint.config["rms_norm_eps"] == 1e-6
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.config["eos_token_id"] == [151645, 151643]
    assert checkpoint.gguf_metadata is not None
    assert len(checkpoint.gguf_metadata["tokenizer.ggml.tokens"]) == 151936
    check_finite(checkpoint)


def check_finite(checkpoint: Checkpoint) -> None:
    """All tensors of one layer: a wrong offset or block layout shows as numbers no weight has."""
    for name in checkpoint.weights.names():
        if ".layers.1." in name:
            assert checkpoint.weights.get(name).abs().max() < 200, name
