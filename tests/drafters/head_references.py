"""EAGLE-3 and multi-token prediction heads written out in torch, from their papers and published code, and random
checkpoints of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

EPS, THETA = 1e-5, 5000.0
VOCAB, DRAFT_VOCAB, WIDTH = 272, 200, 64


def rms_norm(x: Tensor, weight: Tensor, offset: float = 0.0) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * (weight + offset)


def rotated(x: Tensor, share: float = 1.0, theta: float = THETA) -> Tensor:
    """x [L, H, D], place i turned by i."""
    length, _, size = x.shape
    dim = int(size * share)
    angles = torch.arange(length)[:, None] / theta ** (torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal, [L, H, D] and [L, KV, D] -> [L, H * D]."""
    length, heads, size = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * size**-0.5
    behind = torch.arange(length)[:, None] - torch.arange(length)
    scores.masked_fill_((behind < 0) | (behind >= (window or length)), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


def swiglu(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    gate, up = (x @ tensors[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
    return (F.silu(gate) * up) @ tensors[f"{name}.down_proj.weight"].T


def mixture(x: Tensor, tensors: dict[str, Tensor], name: str, num_active: int) -> Tensor:
    """Experts in fused tensors, weighed by the router's softmax over those chosen, and one that all tokens go to."""
    weights, chosen = (x @ tensors[f"{name}.gate.weight"].T).softmax(-1).topk(num_active)
    weights = weights / weights.sum(-1, keepdim=True)
    y = swiglu(x, tensors, f"{name}.shared_expert") * (x @ tensors[f"{name}.shared_expert_gate.weight"].T).sigmoid()
    for row in range(len(x)):
        for weight, expert in zip(weights[row], chosen[row], strict=True):
            gate, up = (tensors[f"{name}.experts.gate_up_proj"][expert] @ x[row]).chunk(2)
            y[row] += weight * (tensors[f"{name}.experts.down_proj"][expert] @ (F.silu(gate) * up))
    return y


@dataclass
class EagleReference:
    """A head under the names of EAGLE's own code."""

    tensors: dict[str, Tensor]
    embedding: Tensor
    num_heads: int = 4
    norm_before_residual: bool = False
    norm_output: bool = False
    window: int | None = None

    def enter(self, hidden: Tensor) -> Tensor:
        if "input_norm.weight" in self.tensors:
            hidden = rms_norm(hidden, self.tensors["input_norm.weight"])
        if "fc_norm.0.weight" in self.tensors:
            parts = enumerate(hidden.chunk(3, dim=-1))
            hidden = torch.cat([rms_norm(x, self.tensors[f"fc_norm.{i}.weight"]) for i, x in parts], dim=-1)
        return hidden @ self.tensors["fc.weight"].T

    def __call__(self, ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the tokens after the states [L, width] -> logits over the model's vocabulary, states left."""
        t = self.tensors
        normed = rms_norm(states, t["midlayer.hidden_norm.weight"])
        x = torch.cat([rms_norm(self.embedding[ids], t["midlayer.input_layernorm.weight"]), normed], dim=-1)
        q, k, v = (x @ t[f"midlayer.self_attn.{part}_proj.weight"].T for part in "qkv")
        size = q.shape[1] // self.num_heads
        q, k, v = (y.view(len(y), -1, size) for y in (q, k, v))
        x = attention(rotated(q), rotated(k), v, self.window) @ t["midlayer.self_attn.o_proj.weight"].T
        x = x + (normed if self.norm_before_residual else states)
        left = x + swiglu(rms_norm(x, t["midlayer.post_attention_layernorm.weight"]), t, "midlayer.mlp")
        said = rms_norm(left, t["norm.weight"])
        own = said @ t["lm_head.weight"].T
        logits = torch.full((len(ids), len(self.embedding)), -torch.inf)
        logits[:, torch.arange(own.shape[1]) + t["d2t"]] = own
        return logits, said if self.norm_output else left


@dataclass
class MTPReference:
    """A head with the gates, normalised heads and offset norms of Qwen3.5."""

    tensors: dict[str, Tensor]
    embedding: Tensor
    output_matrix: Tensor
    num_heads: int
    head_dim: int
    share: float  # of a head's channels that turn
    theta: float
    num_active: int = 0  # experts of a token; 0: there are none

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden

    def __call__(self, ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        t, layer = self.tensors, "mtp.layers.0"
        embedded = rms_norm(self.embedding[ids], t["mtp.pre_fc_norm_embedding.weight"], 1)
        x = torch.cat([embedded, rms_norm(states, t["mtp.pre_fc_norm_hidden.weight"], 1)], dim=-1)
        residual = x @ t["mtp.fc.weight"].T
        x = rms_norm(residual, t[f"{layer}.input_layernorm.weight"], 1)
        q, k, v = (x @ t[f"{layer}.self_attn.{part}_proj.weight"].T for part in "qkv")
        q, gate = q.view(len(q), self.num_heads, 2 * self.head_dim).chunk(2, dim=-1)
        k, v = (y.view(len(y), -1, self.head_dim) for y in (k, v))
        q = rms_norm(q, t[f"{layer}.self_attn.q_norm.weight"], 1)
        k = rms_norm(k, t[f"{layer}.self_attn.k_norm.weight"], 1)
        q, k = (rotated(y, self.share, self.theta) for y in (q, k))
        x = attention(q, k, v) * gate.flatten(1).sigmoid()
        x = residual + x @ t[f"{layer}.self_attn.o_proj.weight"].T
        normed = rms_norm(x, t[f"{layer}.post_attention_layernorm.weight"], 1)
        x = x + (
            mixture(normed, t, f"{layer}.mlp", self.num_active)
            if self.num_active
            else swiglu(normed, t, f"{layer}.mlp")
        )
        said = rms_norm(x, t["mtp.norm.weight"], 1)
        return said @ self.output_matrix.T, said


def eagle_tensors(seed: int = 0, inner: int = 96, **extra: tuple[int, ...]) -> dict[str, Tensor]:
    """Random ones; `extra`: shapes of further tensors, "." as "__" in their names."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (WIDTH, 3 * WIDTH),
        "norm.weight": (WIDTH,),
        "lm_head.weight": (DRAFT_VOCAB, WIDTH),
        "midlayer.self_attn.q_proj.weight": (64, 2 * WIDTH),
        "midlayer.self_attn.k_proj.weight": (32, 2 * WIDTH),
        "midlayer.self_attn.v_proj.weight": (32, 2 * WIDTH),
        "midlayer.self_attn.o_proj.weight": (WIDTH, 64),
        "midlayer.mlp.gate_proj.weight": (inner, WIDTH),
        "midlayer.mlp.up_proj.weight": (inner, WIDTH),
        "midlayer.mlp.down_proj.weight": (WIDTH, inner),
    }
    names = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    shapes |= {f"midlayer.{name}.weight": (WIDTH,) for name in names}
    shapes |= {name.replace("__", "."): shape for name, shape in extra.items()}
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.3) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    ids = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[ids] = True
    return tensors | {"d2t": ids - torch.arange(DRAFT_VOCAB), "t2d": known}


def eagle_config(**more: Any) -> dict[str, Any]:
    """Of a head for the tiny Llama of two layers, as EAGLE's own code writes it."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT_VOCAB, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "max_position_embeddings": 2048, "rms_norm_eps": EPS, "rope_theta": THETA,
        "hidden_act": "silu", "tie_word_embeddings": False, "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    } | more  # fmt: skip


def write_head(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def mtp_tensors(width: int, heads: int, kv_heads: int, head_dim: int, inner: int) -> dict[str, Tensor]:
    """Random ones of a dense head of Qwen3.5."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "fc": (width, 2 * width),
        "layers.0.self_attn.q_proj": (2 * heads * head_dim, width),
        "layers.0.self_attn.k_proj": (kv_heads * head_dim, width),
        "layers.0.self_attn.v_proj": (kv_heads * head_dim, width),
        "layers.0.self_attn.o_proj": (width, heads * head_dim),
        "layers.0.self_attn.q_norm": (head_dim,),
        "layers.0.self_attn.k_norm": (head_dim,),
        "layers.0.mlp.gate_proj": (inner, width),
        "layers.0.mlp.up_proj": (inner, width),
        "layers.0.mlp.down_proj": (width, inner),
    }
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "layers.0.input_layernorm")
    shapes |= dict.fromkeys((*norms, "layers.0.post_attention_layernorm"), (width,))
    return {f"mtp.{name}.weight": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
