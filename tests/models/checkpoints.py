"""Tiny random checkpoints made by transformers, and what it computes with them: the oracle of the model tests."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

LENGTHS = (60, 23, 1, 41, 96)  # tokens of the prompts
SHORT = {"max_position_embeddings": 64}  # tokens; the rope stretches it

LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama grouped untied": ("Llama", {}),
    "llama ungrouped tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("Llama", {"head_dim": 48, "num_key_value_heads": 1}),
    "llama linear": ("Llama", SHORT | {"rope_parameters": LINEAR}),
    "llama dynamic": ("Llama", SHORT | {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", SHORT | {"rope_parameters": YARN}),
    "llama yarn scales": ("Llama", SHORT | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama yarn whole": ("Llama", SHORT | {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding": ("Qwen2", SLIDING),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 biases": ("Qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3 sliding": ("Qwen3", {"head_dim": 32} | SLIDING),
    "qwen2 moe": ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 80}),
    "qwen2 moe fused": ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 80, "norm_topk_prob": True}),
    "qwen3 moe": ("Qwen3Moe", MIXTURE | {"head_dim": 32, "norm_topk_prob": True}),
    "qwen3 moe partly": ("Qwen3Moe", MIXTURE | {"head_dim": 32, "mlp_only_layers": [0], "decoder_sparse_step": 1}),
    "qwen3 moe sliding": (
        "Qwen3Moe",
        MIXTURE | {"head_dim": 32, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 12},
    ),
}


class DictWeights:
    """contracts.Weights over tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensors[name].to(dtype or self.tensors[name].dtype)

    def release(self, names: Iterable[str]) -> None:
        """They stay."""


@dataclass
class Reference:
    """A checkpoint, prompts, and transformers' logits after each of their tokens."""

    config: dict[str, Any]  # config.json's content
    weights: DictWeights
    prompts: list[list[int]]
    logits: list[Tensor]  # [L, vocab_size] float32 each


def make_reference(case: str) -> Reference:
    import transformers

    family, settings = CASES[case]
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=199,
        **{"num_key_value_heads": 2, "max_position_embeddings": 128} | settings,
        architectures=[f"{family}ForCausalLM"],
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(mean=float(parameter.dim() == 1), std=0.2)
    tensors = dict(model.state_dict()) if case.endswith("fused") else _published(model)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in LENGTHS]
    return Reference(config.to_dict(), DictWeights(tensors), prompts, [_logits(model, prompt) for prompt in prompts])


def _published(model: Any) -> dict[str, Tensor]:
    """The tensors as checkpoints have them: transformers keeps a layer's experts in one."""
    from safetensors.torch import load_file

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


@torch.inference_mode()
def _logits(model: Any, prompt: list[int]) -> Tensor:
    """Beyond the trained context one token per pass, as when they are generated: see blade.nn.DynamicRope."""
    import transformers

    ids, trained = torch.tensor([prompt]), model.config.max_position_embeddings
    parts = [ids[:, :trained], *(ids[:, i : i + 1] for i in range(trained, len(prompt)))]
    renamed = "cache" in inspect.signature(model.forward).parameters  # in transformers 5.24
    cache = {"cache" if renamed else "past_key_values": transformers.DynamicCache(config=model.config)}
    return torch.cat([model(part, **cache, use_cache=True).logits[0] for part in parts])
