"""GGUF's tensor names and Hugging Face's, for the architectures that blade serves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_FEED_FORWARD = {
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "ffn_gate_inp": "gate",
    "ffn_gate_inp_shexp": "shared_expert_gate",
    "ffn_gate_shexp": "shared_expert.gate_proj",
    "ffn_up_shexp": "shared_expert.up_proj",
    "ffn_down_shexp": "shared_expert.down_proj",
}
_EXPERTS = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
_DELTA_NET = {  # of recurrent layers
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_VECTORS = {"ssm_dt.bias": "linear_attn.dt_bias", "ssm_a": "linear_attn.A_log"}  # whole names
_HEAD = "nextn."
_HEADS = {  # of layers that predict further tokens
    "nextn.eh_proj": "fc",
    "nextn.enorm": "pre_fc_norm_embedding",
    "nextn.hnorm": "pre_fc_norm_hidden",
    "nextn.shared_head_norm": "norm",
}
_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,3})\.)?((?:nextn\.)?\w+)(?:\.(weight|bias))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Of one model."""

    recurrent: bool = False  # some layers are, and the last ones may be heads that predict further tokens
    num_layers: int = 0  # of the model without those heads; needed where there may be some
    feed_forward: str = "mlp"
    renamed: dict[str, str] = field(default_factory=dict)  # what this architecture calls otherwise

    def hf_names(self, name: str, num_experts: int) -> list[str] | None:
        """What a tensor is to Hugging Face: "blk.3.attn_q.weight" is ["model.layers.3.self_attn.q_proj.weight"]. One
        that holds all experts of a layer is several matrices, stacked: "blk.3.ffn_up_exps.weight" is
        ["model.layers.3.mlp.experts.0.up_proj.weight", ...]. None for a tensor blade does not know."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        layer, part, kind = match.groups()
        if layer is None:
            return [f"{_MODEL[part]}.{kind}"] if part in _MODEL and kind else None
        head = self.recurrent and int(layer) >= self.num_layers
        prefix = f"mtp.layers.{int(layer) - self.num_layers}" if head else f"model.layers.{layer}"
        if head and kind and part.startswith(_HEAD):  # one that blade does not know is the drafter's to refuse
            return [f"mtp.{_HEADS.get(part, part.removeprefix(_HEAD))}.{kind}"]
        if part in _EXPERTS and kind:
            experts = f"{prefix}.{self.feed_forward}.experts"
            return [f"{experts}.{expert}.{half}.{kind}" for expert in range(num_experts) for half in _EXPERTS[part]]
        known = self._in_layer(part, kind)
        return None if known is None else [f"{prefix}.{known}"]

    def _in_layer(self, part: str, kind: str | None) -> str | None:
        whole = f"{part}.{kind}" if kind else part
        if self.recurrent and whole in _VECTORS:
            return _VECTORS[whole]
        if part in _FEED_FORWARD:
            known = f"{self.feed_forward}.{self.renamed.get(part, _FEED_FORWARD[part])}"
        else:
            known = (_ATTENTION | (_DELTA_NET if self.recurrent else {})).get(part, "")
        return f"{known}.{kind}" if known and kind else None
