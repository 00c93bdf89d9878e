"""What config.json and generation_config.json would say, made from a GGUF file's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade.checkpoint.gguf.layouts import HYBRIDS, DeltaHeads, num_layers
from blade.checkpoint.gguf.metadata import Metadata
from blade.checkpoint.gguf.rope import rope_parameters
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from blade.checkpoint.gguf.weights import GGUFWeights

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen2vl": "Qwen2VLForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen3vl": "Qwen3VLForConditionalGeneration",
    "qwen3vlmoe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3next": "Qwen3NextForCausalLM",
    "qwen35": "Qwen3_5ForCausalLM",
    "qwen35moe": "Qwen3_5MoeForCausalLM",
}
# Whether the weights of a token's experts sum to 1, as llama.cpp has it
_NORMALIZED = {
    "llama4": False,
    "qwen2moe": False,
    "qwen3moe": True,
    "qwen3vlmoe": True,
    "qwen3next": True,
    "qwen35moe": True,
}
_END_TOKENS = {"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}
_CONTROL = 3  # of tokenizer.ggml.token_type


def check_architecture(metadata: Metadata) -> None:
    if metadata.arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.path} holds a model of architecture {metadata.arch!r:.60}, which blade does not know.",
            f"Known in GGUF files are {', '.join(ARCHITECTURES)}.",
        )


def make_config(metadata: Metadata, weights: GGUFWeights) -> dict[str, Any]:
    names = set(weights.names())
    if "model.embed_tokens.weight" not in names:
        raise CheckpointError(f"{metadata.path} has no tensor token_embd.weight.")
    num_tokens, num_rows = (
        len(metadata.array("tokenizer.ggml.tokens", str)),
        weights.shape("model.embed_tokens.weight")[0],
    )
    if num_tokens > num_rows:
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.tokens has {num_tokens} tokens, and token_embd.weight {num_rows} rows.",
            "Fetch the file again, or another of the model.",
        )
    if metadata.arch not in _NORMALIZED and any(name.endswith(".mlp.gate.weight") for name in names):
        raise CheckpointError(f"{metadata.path} holds experts, which blade does not know of {metadata.arch!r} models.")
    hidden_size, num_heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", hidden_size // num_heads)
    return {
        "architectures": [ARCHITECTURES[metadata.arch]],
        "model_type": metadata.arch,
        "vocab_size": num_rows,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers(metadata),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.integer("context_length"),
        "rope_parameters": rope_parameters(metadata, head_dim, weights.rope_factors()),
        "attention_bias": any(name.endswith(".self_attn.q_proj.bias") for name in names),
        "tie_word_embeddings": "lm_head.weight" not in names,
        **_feed_forward(metadata, weights, names),
        **(_recurrent(metadata) if metadata.arch in HYBRIDS else {}),
    }


def _feed_forward(metadata: Metadata, weights: GGUFWeights, names: set[str]) -> dict[str, Any]:
    if metadata.arch == "llama4":
        return _llama4(metadata, names)
    if metadata.arch not in _NORMALIZED:
        return {"intermediate_size": metadata.integer("feed_forward_length")}
    found = _experts(metadata, weights, names)
    return {"intermediate_size": metadata.integer("feed_forward_length", found["moe_intermediate_size"]), **found}


def _experts(metadata: Metadata, weights: GGUFWeights, names: set[str]) -> dict[str, Any]:
    """Sizes are those of the first layer that has experts; a layer without a router is dense."""
    sparse = _routed(metadata, names, "mlp.gate")
    prefix = f"model.layers.{sparse[0]}.mlp"
    if f"{prefix}.experts.0.gate_proj.weight" not in names:
        raise CheckpointError(f"{metadata.path} has no tensor blk.{sparse[0]}.ffn_gate_exps.weight.")
    sizes = {
        "moe_intermediate_size": f"{prefix}.experts.0.gate_proj.weight",
        "shared_expert_intermediate_size": f"{prefix}.shared_expert.gate_proj.weight",
    }
    return {
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "norm_topk_prob": _NORMALIZED[metadata.arch],
        "mlp_only_layers": [layer for layer in range(num_layers(metadata)) if layer not in sparse],
        **{key: weights.shape(name)[0] for key, name in sizes.items() if name in names},
    }


def _routed(metadata: Metadata, names: set[str], router: str) -> list[int]:
    """The layers that have a router."""
    sparse = [i for i in range(num_layers(metadata)) if f"model.layers.{i}.{router}.weight" in names]
    if not sparse:
        raise CheckpointError(f"{metadata.path} has no tensor blk.N.ffn_gate_inp.weight, though it is to have experts.")
    return sparse


def _llama4(metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """Where llama.cpp takes something for granted, so does blade: one layer in four without positions, chunks of 8192,
    and queries and keys that are normalised but for the model of 128 experts."""
    if metadata.integer("attention.sliding_window", 8192, minimum=0) == 0:
        metadata.refuse("attention.sliding_window", "above 0: models without chunks are not served")
    num_experts = metadata.integer("expert_count")
    return {
        "intermediate_size": metadata.integer("expert_feed_forward_length"),
        "intermediate_size_mlp": metadata.integer("feed_forward_length"),
        "num_local_experts": num_experts,
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_layers": _routed(metadata, names, "feed_forward.router"),
        "use_qk_norm": num_experts != 128,
    }


def _recurrent(metadata: Metadata) -> dict[str, Any]:
    """Of models some of whose layers are gated delta nets."""
    heads, depth = DeltaHeads.read(metadata), num_layers(metadata)
    recurrent = metadata.array("attention.recurrent_layers", bool)[:depth]
    if not recurrent:
        interval = metadata.integer("full_attention_interval", 4)
        recurrent = [(i + 1) % interval != 0 for i in range(depth)]
    return {
        "linear_num_key_heads": heads.num_k,
        "linear_num_value_heads": heads.num_v,
        "linear_key_head_dim": heads.key_dim,
        "linear_value_head_dim": heads.value_dim,
        "linear_conv_kernel_dim": metadata.integer("ssm.conv_kernel"),
        "layer_types": ["linear_attention" if each else "full_attention" for each in recurrent],
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
