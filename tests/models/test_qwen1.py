"""The first Qwen against its formulas written out, for transformers has only its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import LENGTHS, Reference
from stepper import Stepper, all_together, one_by_one
from torch import Tensor
from torch.nn import functional as F

from blade import CheckpointError
from blade.testing import TensorWeights
from blade_qwen.qwen1 import Qwen1

HIDDEN, HEADS, LAYERS, INNER, VOCAB = 64, 4, 2, 80, 151
CONFIG: dict[str, Any] = {  # the keys of Qwen-7B's config.json that matter
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": HIDDEN, "intermediate_size": 2 * INNER,
    "kv_channels": 16, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192, "no_bias": True,
    "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "seq_length": 128, "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True,
    "vocab_size": VOCAB,
}  # fmt: skip


def make_tensors() -> dict[str, Tensor]:
    shapes = {"transformer.wte.weight": (VOCAB, HIDDEN), "transformer.ln_f.weight": (HIDDEN,)}
    shapes |= {"lm_head.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        prefix = f"transformer.h.{i}."
        shapes |= {
            prefix + "ln_1.weight": (HIDDEN,),
            prefix + "ln_2.weight": (HIDDEN,),
            prefix + "attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
            prefix + "attn.c_attn.bias": (3 * HIDDEN,),
            prefix + "attn.c_proj.weight": (HIDDEN, HIDDEN),
            prefix + "mlp.w1.weight": (INNER, HIDDEN),
            prefix + "mlp.w2.weight": (INNER, HIDDEN),
            prefix + "mlp.c_proj.weight": (HIDDEN, INNER),
        }
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1 and "ln" in name)
        for name, shape in shapes.items()
    }


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: Tensor) -> Tensor:
    """x [L, heads, 16]: channel i turns with channel i + 8."""
    angles = torch.arange(len(x))[:, None] / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    cos, sin = (torch.cat((part, part), dim=1)[:, None] for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def logits(prompt: list[int], tensors: dict[str, Tensor]) -> Tensor:
    """[L, VOCAB]."""
    x = tensors["transformer.wte.weight"][prompt]
    hidden = torch.ones(len(prompt), len(prompt)).triu(1).bool()
    for i in range(LAYERS):
        w = {name.removeprefix(f"transformer.h.{i}."): tensor for name, tensor in tensors.items()}
        mixed = norm(x, w["ln_1.weight"]) @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]
        q, k, v = (part.view(len(prompt), HEADS, 16) for part in mixed.split(HIDDEN, dim=1))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / 4
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ w["attn.c_proj.weight"].T
        y = norm(x, w["ln_2.weight"])
        x = x + (y @ w["mlp.w1.weight"].T * F.silu(y @ w["mlp.w2.weight"].T)) @ w["mlp.c_proj.weight"].T
    return norm(x, tensors["transformer.ln_f.weight"]) @ tensors["lm_head.weight"].T


def test_logits_are_those_of_the_formulas() -> None:
    tensors, generator = make_tensors(), torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    expected = [logits(prompt, tensors) for prompt in prompts]
    reference = Reference(CONFIG, TensorWeights(tensors), prompts, expected)
    for steps in (one_by_one(list(LENGTHS), chunk=1000), all_together(list(LENGTHS), seed=0)):
        found = Stepper(reference).run(steps)
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-4


def test_its_context_is_the_one_it_was_trained_on() -> None:
    assert Qwen1().configure(CONFIG).max_context == 128
    with pytest.raises(CheckpointError, match="rotary_pct"):
        Qwen1().configure(CONFIG | {"rotary_pct": 1.5})
