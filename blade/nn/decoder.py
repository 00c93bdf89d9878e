"""The decoder that Llama made common: pre-norm, rotary positions, grouped-query attention, SwiGLU.

Llama 2 (Touvron et al. 2023), Qwen2 and Qwen3 differ only in what `DecoderConfig` and the checkpoint's tensors say:
biases are used where there are any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Loader
    from blade.nn.config import DecoderConfig
    from blade.types import Batch, KVCache


class Norm:
    """Root mean square norm (Zhang & Sennrich 2019)."""

    def __init__(self, name: str, width: int, eps: float, loader: Loader) -> None:
        self.ops = loader.ops
        self.weight = loader.tensor(f"{name}.weight", (width,))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class SelfAttention:
    """Queries, keys and values from one linear; paged attention; the output linear."""

    def __init__(self, name: str, config: DecoderConfig, window: int | None, loader: Loader) -> None:
        self.attention = loader.attention
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = window
        widths = [num_heads * self.head_dim for num_heads in self.heads]
        self.qkv = loader.linear(
            f"{name}.q_proj",
            f"{name}.k_proj",
            f"{name}.v_proj",
            shapes=[(width, config.hidden_size) for width in widths],
        )
        self.o = loader.linear(f"{name}.o_proj", shapes=[(config.hidden_size, widths[0])])
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = Norm(f"{name}.q_norm", self.head_dim, config.rms_norm_eps, loader)
            self.k_norm = Norm(f"{name}.k_norm", self.head_dim, config.rms_norm_eps, loader)

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: object) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        heads = self.qkv(x).view(len(x), -1, self.head_dim)  # [T, H + 2 KV, D]
        q, k, v = torch.split_with_sizes(heads, self.heads, dim=1)
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.attention.rope_and_store(q, k, v, cos_sin, batch, layer_kv)
        return self.o(self.attention.attend(q, k, v, batch, layer_kv, self.scale, self.window))


class FeedForward:
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), gate and up in one linear."""

    def __init__(self, name: str, config: DecoderConfig, loader: Loader) -> None:
        self.ops = loader.ops
        inner, outer = config.intermediate_size, config.hidden_size
        self.gate_up = loader.linear(f"{name}.gate_proj", f"{name}.up_proj", shapes=[(inner, outer)] * 2)
        self.down = loader.linear(f"{name}.down_proj", shapes=[(outer, inner)])

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        return self.down(self.ops.silu_mul(self.gate_up(x)))


class Layer:
    """One of the decoder's layers; what it adds to the residual stream is added by the norm that comes next."""

    def __init__(self, name: str, config: DecoderConfig, window: int | None, loader: Loader) -> None:
        eps = config.rms_norm_eps
        self.input_norm = Norm(f"{name}.input_layernorm", config.hidden_size, eps, loader)
        self.attention = SelfAttention(f"{name}.self_attn", config, window, loader)
        self.post_norm = Norm(f"{name}.post_attention_layernorm", config.hidden_size, eps, loader)
        self.feed_forward = FeedForward(f"{name}.mlp", config, loader)


class Decoder:
    """contracts.Model of a Llama-like checkpoint."""

    def __init__(self, config: DecoderConfig, loader: Loader) -> None:
        self.config = config
        self.ops = loader.ops
        shape = (config.vocab_size, config.hidden_size)
        tied = config.tied and not loader.has("lm_head.weight")
        self.lm_head = loader.linear("model.embed_tokens" if tied else "lm_head", shapes=[shape])
        self.embed = loader.embedding("model.embed_tokens", shape, self.lm_head if tied else None)
        self.layers = [Layer(f"model.layers.{i}", config, window, loader) for i, window in enumerate(config.windows)]
        self.norm = Norm("model.norm", config.hidden_size, config.rms_norm_eps, loader)
        self.next_norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        self.cos_sin = loader.ops.to_device(config.rope.table(config.max_context))

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """See contracts.Model."""
        residual = self.embed(batch.input_ids)  # [T, hidden_size]
        x = self.layers[0].input_norm(residual)
        for layer, next_norm, layer_kv in zip(self.layers, self.next_norms, kv, strict=True):
            x = layer.attention(x, self.cos_sin, batch, layer_kv)
            if layer is self.layers[-1]:  # no later token attends to what comes now
                x, residual = (self.ops.take_rows(y, batch.logits_rows) for y in (x, residual))  # [R, hidden_size]
            x, residual = layer.post_norm.add(x, residual)
            x, residual = next_norm.add(layer.feed_forward(x), residual)
        return self.lm_head(x, torch.float32)
