"""What config.json and generation_config.json would say, made from a GGUF file's metadata."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from blade.checked import MAX_LAYERS
from blade.checkpoint.gguf.metadata import Metadata
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from blade.checkpoint.gguf.weights import GGUFWeights

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
_NORMALIZED = {"qwen2moe": False, "qwen3moe": True}  # the weights of a token's experts sum to 1, as llama.cpp has it
_END_TOKENS = {"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}
_CONTROL = 3  # of tokenizer.ggml.token_type
_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def check_architecture(metadata: Metadata) -> None:
    if metadata.arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.path} holds a model of architecture {metadata.arch!r}, which blade does not know.",
            f"Known in GGUF files are {', '.join(ARCHITECTURES)}.",
        )


def reordered_heads(metadata: Metadata) -> dict[str, int]:
    """The modules whose rows llama.cpp's converter has reordered, with their number of heads."""
    if metadata.arch != "llama":
        return {}
    num_heads = metadata.integer("attention.head_count")
    return {"q_proj": num_heads, "k_proj": metadata.integer("attention.head_count_kv", num_heads)}


def make_config(metadata: Metadata, weights: GGUFWeights) -> dict[str, Any]:
    names = set(weights.names())
    if "model.embed_tokens.weight" not in names:
        raise CheckpointError(f"{metadata.path} has no tensor token_embd.weight.")
    if metadata.arch not in _NORMALIZED and any(name.endswith(".mlp.gate.weight") for name in names):
        raise CheckpointError(f"{metadata.path} holds experts, which blade does not know of {metadata.arch!r} models.")
    hidden_size, num_heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", hidden_size // num_heads)
    return {
        "architectures": [ARCHITECTURES[metadata.arch]],
        "model_type": metadata.arch,
        "vocab_size": weights.shape("model.embed_tokens.weight")[0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count", maximum=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.integer("context_length"),
        "rope_parameters": _rope(metadata, head_dim, weights.rope_factors()),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "tie_word_embeddings": "lm_head.weight" not in names,
        **(_experts(metadata, weights, names) if metadata.arch in _NORMALIZED else {}),
    }


def _experts(metadata: Metadata, weights: GGUFWeights, names: set[str]) -> dict[str, Any]:
    """Sizes are those of the first layer that has experts; a layer without a router is dense."""
    layers = range(metadata.integer("block_count", maximum=MAX_LAYERS))
    sparse = [layer for layer in layers if f"model.layers.{layer}.mlp.gate.weight" in names]
    if not sparse:
        raise CheckpointError(f"{metadata.path} has no tensor blk.N.ffn_gate_inp.weight, though it is to have experts.")
    prefix = f"model.layers.{sparse[0]}.mlp"
    sizes = {
        "moe_intermediate_size": f"{prefix}.experts.0.gate_proj.weight",
        "shared_expert_intermediate_size": f"{prefix}.shared_expert.gate_proj.weight",
    }
    return {
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "norm_topk_prob": _NORMALIZED[metadata.arch],
        "mlp_only_layers": [layer for layer in layers if layer not in sparse],
        **{key: weights.shape(name)[0] for key, name in sizes.items() if name in names},
    }


def make_generation_config(metadata: Metadata) -> dict[str, Any]:
    """The ids that begin, end and pad a text. A chat model ends its turn with another token than a text, and GGUF names
    only one of them: control tokens that are known to end something count too."""
    config: dict[str, Any] = {}
    for key, source in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if f"tokenizer.ggml.{source}" in metadata.values:
            config[key] = metadata.integer(f"tokenizer.ggml.{source}", minimum=0)
    ends = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = [metadata.integer(key, minimum=0) for key in ends if key in metadata.values]
    ids += _known_ends(metadata)
    return config | {"eos_token_id": list(dict.fromkeys(ids))}


def _known_ends(metadata: Metadata) -> list[int]:
    tokens = metadata.array("tokenizer.ggml.tokens", str)
    types = metadata.array("tokenizer.ggml.token_type", int)
    found = _END_TOKENS.intersection(tokens)
    return [
        i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == _CONTROL and token in found
    ]


def _rope(metadata: Metadata, head_dim: int, factors: list[float] | None) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base", 10000.0)}
    rotary_dim = metadata.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        rope["partial_rotary_factor"] = rotary_dim / head_dim
    kind = metadata.text("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            metadata.refuse("rope.scaling.type", "none beside a tensor rope_freqs.weight")
        return rope | _llama3(metadata, factors, rope["rope_theta"], head_dim)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        metadata.refuse("rope.scaling.type", "none, linear or yarn")
    rope |= {"rope_type": kind, "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        context = metadata.integer("rope.scaling.original_context_length", metadata.integer("context_length"))
        rope["original_max_position_embeddings"] = context
        for key, source in _YARN.items():
            if metadata.has(f"rope.scaling.{source}"):
                rope[key] = metadata.number(f"rope.scaling.{source}")
    return rope


def _llama3(metadata: Metadata, factors: list[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3.1's rope that give these factors. All released models share all but one: the largest
    factor, that of the slow frequencies."""
    factor = max(factors)
    if len(factors) != head_dim // 2 or not 1 <= factor < math.inf:
        raise CheckpointError(
            f"{metadata.path}: rope_freqs.weight is not one factor for each pair of {head_dim} channels."
        )
    low, high, context = _LLAMA3.values()
    for i, found in enumerate(factors):
        turns = context * theta ** (-i / len(factors)) / (2 * math.pi)  # of this pair in the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(found, 1 / ((1 - share) / factor + share), rel_tol=1e-3):
            raise CheckpointError(
                f"{metadata.path}: rope_freqs.weight is not that of Llama 3, which is all blade knows."
            )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
