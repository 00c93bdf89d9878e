"""GGUF's tensor names and Hugging Face's, for the architectures that share the Llama layout."""

from __future__ import annotations

import re

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,3})\.)?(\w+)\.(weight|bias)", re.ASCII)


def hf_name(name: str) -> str | None:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; None for a tensor blade does not know."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    if layer is None:
        return f"{_MODEL[part]}.{kind}" if part in _MODEL else None
    return f"model.layers.{layer}.{_LAYER[part]}.{kind}" if part in _LAYER else None


def expert_names(name: str, num_experts: int) -> list[str] | None:
    """The matrices of a tensor that holds all experts of a layer: "blk.3.ffn_up_exps.weight" is
    ["model.layers.3.mlp.experts.0.up_proj.weight", ...]. None for any other tensor."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] is None or match[2] not in _EXPERTS:
        return None
    experts = f"model.layers.{match[1]}.mlp.experts"
    return [f"{experts}.{expert}.{_EXPERTS[match[2]]}.{match[3]}" for expert in range(num_experts)]
