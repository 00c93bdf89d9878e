"""The decoder that Llama made common: pre-norm, rotary positions, grouped-query attention, SwiGLU.

Llama 2 (Touvron et al. 2023), Qwen2, Qwen3 and their mixtures of experts differ only in what `DecoderConfig` and the
checkpoint's tensors say: biases are used where there are any. Other families replace a layer's parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch

from blade.contracts.heads import NORMED
from blade.errors import CheckpointError
from blade.nn.dual_chunks import sharpness
from blade.nn.hidden import ShownStates
from blade.nn.mixture import Mixture

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import DualChunkAttention, Linear, Loader
    from blade.nn.config import DecoderConfig
    from blade.types import Batch, KVCache


class Norm:
    """Root mean square norm (Zhang & Sennrich 2019)."""

    def __init__(self, name: str, width: int, eps: float, loader: Loader, offset: float = 0.0) -> None:
        """`offset`: added to the weight."""
        self.ops = loader.ops
        weight = loader.tensor(f"{name}.weight", (width,), torch.float32)
        self.weight = weight.add(offset).to(loader.dtype)  # rounded once
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class SelfAttention:
    """Queries, keys and values from one linear; paged attention; the output linear."""

    def __init__(self, name: str, config: DecoderConfig, window: int | None, loader: Loader) -> None:
        self.ops, self.attention = loader.ops, loader.attention
        num_heads, num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.num_gates = num_heads if config.output_gate else 0
        self.heads = [num_heads, self.num_gates, num_kv_heads, num_kv_heads]
        self.scale = config.head_dim**-0.5
        self.window = window
        self.chunk: int | None = None  # of positions, that a query sees keys of
        self.dual_chunks = config.chunks
        self.sharpness: Tensor | None = None  # [max_context] float32: what a query is multiplied by
        if config.sharpened_after is not None and config.max_context > config.sharpened_after:
            self.sharpness = loader.ops.to_device(sharpness(config.max_context, config.sharpened_after))
        widths = [num * self.head_dim for num in (num_heads + self.num_gates, num_kv_heads, num_kv_heads)]
        shapes = [(width, config.hidden_size) for width in widths]
        self.qkv, self.o = self.projections(name, shapes, (config.hidden_size, num_heads * self.head_dim), loader)
        self.q_norm: Callable[[Tensor], Tensor] | None = None
        self.k_norm: Callable[[Tensor], Tensor] | None = None
        if config.qk_norm:
            self.q_norm = Norm(f"{name}.q_norm", self.head_dim, config.rms_norm_eps, loader, config.norm_offset)
            self.k_norm = Norm(f"{name}.k_norm", self.head_dim, config.rms_norm_eps, loader, config.norm_offset)

    def projections(
        self, name: str, qkv: Seq[tuple[int, int]], o: tuple[int, int], loader: Loader
    ) -> tuple[Linear, Linear]:
        """The linears to queries (and gates), keys and values, of the shapes `qkv`, and to the output, of shape `o`."""
        names = (f"{name}.{part}_proj" for part in "qkv")
        return loader.linear(*names, shapes=qkv, order=self.row_order()), loader.linear(f"{name}.o_proj", shapes=[o])

    def row_order(self) -> Tensor | None:
        """All queries before all gates; in the checkpoint each head's gate follows its query."""
        if not self.num_gates:
            return None
        num_query_rows = 2 * self.num_gates * self.head_dim
        queries = torch.arange(num_query_rows).view(self.num_gates, 2, self.head_dim).transpose(0, 1).flatten()
        others = torch.arange(num_query_rows, sum(self.heads) * self.head_dim)
        return torch.cat((queries, others))

    def queries(self, q: Tensor, batch: Batch) -> Tensor:
        """q [T, H, D], before they are rotated, as they are to be."""
        return q if self.sharpness is None else self.ops.scale_rows(q, self.sharpness, batch.positions)

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: object) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        heads = self.qkv(x).view(len(x), -1, self.head_dim)  # [T, H (+ H) + 2 KV, D]
        q, gate, k, v = torch.split_with_sizes(heads, self.heads, dim=1)
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        y = self.attend(self.queries(q, batch), k, v, cos_sin, batch, layer_kv)
        return self.o(self.ops.sigmoid_mul(y, gate.flatten(1)) if self.num_gates else y)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: object) -> Tensor:
        """q [T, H, D], k and v [T, KV, D], not rotated -> [T, H * D]."""
        if self.dual_chunks is not None:
            attention = cast("DualChunkAttention", self.attention)
            return attention.attend_dual_chunks(q, k, v, cos_sin, batch, layer_kv, self.scale, self.dual_chunks)
        q, k = self.attention.rope_and_store(q, k, v, cos_sin, batch, layer_kv)
        chunks = () if self.chunk is None else (self.chunk,)
        return self.attention.attend(q, k, v, batch, layer_kv, self.scale, self.window, *chunks)


class FeedForward:
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), gate and up in one linear."""

    def __init__(self, name: str, inner: int, outer: int, loader: Loader) -> None:
        self.ops = loader.ops
        self.gate_up = loader.linear(f"{name}.gate_proj", f"{name}.up_proj", shapes=[(inner, outer)] * 2)
        self.down = loader.linear(f"{name}.down_proj", shapes=[(outer, inner)])

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        """x [T, hidden_size] -> [T, hidden_size]."""
        return (self.down(self.ops.silu_mul(self.gate_up(x))),)


class TokenMixer(Protocol):
    """The part of a layer in which tokens see those before them."""

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: object) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        ...


class ChannelMixer(Protocol):
    """The part of a layer that works on each token by itself."""

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, hidden_size] -> what is to be added up, [T, hidden_size] each."""
        ...


class Layer:
    """One of the decoder's layers; what it adds to the residual stream is added by the norm that comes next."""

    norm_names = ("input_layernorm", "post_attention_layernorm")

    def __init__(
        self, name: str, config: DecoderConfig, attention: TokenMixer, feed_forward: ChannelMixer, loader: Loader
    ) -> None:
        width, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_offset
        first, second = self.norm_names
        self.input_norm = Norm(f"{name}.{first}", width, eps, loader, offset)
        self.attention = attention
        self.post_norm = Norm(f"{name}.{second}", width, eps, loader, offset)
        self.feed_forward = feed_forward


class Decoder:
    """contracts.ReadableModel of a Llama-like checkpoint."""

    names = ("embed_tokens", "layers", "norm")
    layer_type = Layer

    def __init__(self, config: DecoderConfig, loader: Loader) -> None:
        self.config = config
        self.ops = loader.ops
        self.hidden_size = config.hidden_size
        self.shown = ShownStates(loader.ops, config.num_layers, config.hidden_size)
        shape = (config.vocab_size, config.hidden_size)
        table, layers, norm = (f"{config.prefix}.{name}" for name in self.names)
        tied = config.tied and not loader.has(f"{config.head}.weight")
        self.lm_head = loader.linear(table if tied else config.head, shapes=[shape])
        rows = (config.vocab_size + config.extra_rows, config.hidden_size)
        self.embed = loader.embedding(table, rows, self.lm_head if tied else None)
        counted = config.num_layers + len(config.skipped_layers)
        numbers = [number for number in range(counted) if number not in config.skipped_layers]
        self.layers = [self.layer(f"{layers}.{number}", index, loader) for index, number in enumerate(numbers)]
        if loader.has(more := f"{layers}.{counted}.{self.layer_type.norm_names[0]}.weight"):
            raise CheckpointError(f"config.json: num_hidden_layers is {counted}, but there is a tensor {more}.")
        self.norm = Norm(norm, config.hidden_size, config.rms_norm_eps, loader, config.norm_offset)
        self.next_norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        self.cos_sin = loader.ops.to_device(config.rope_table())

    def layer(self, name: str, index: int, loader: Loader) -> Layer:
        """The layer whose tensors are under `name`."""
        attention = self.token_mixer(name, index, loader)
        return self.layer_type(name, self.config, attention, self.channel_mixer(name, index, loader), loader)

    def token_mixer(self, name: str, index: int, loader: Loader) -> TokenMixer:
        return SelfAttention(f"{name}.self_attn", self.config, self.config.windows[index], loader)

    def channel_mixer(self, name: str, index: int, loader: Loader) -> ChannelMixer:
        config, mixture = self.config, self.config.mixture
        if mixture and index in mixture.layers:
            return Mixture(f"{name}.mlp", mixture, config.hidden_size, loader)
        return FeedForward(f"{name}.mlp", config.intermediate_size, config.hidden_size, loader)

    def show_hidden(self, states: Seq[int], out: Tensor) -> None:
        """See contracts.ReadableModel."""
        self.shown.add(states, out)

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """See contracts.Model."""
        shown, rows = self.shown, batch.logits_rows
        residual = self.embed(batch.input_ids)  # [T, hidden_size]
        if shown:
            shown.leave(0, residual)
        x = self.layers[0].input_norm(residual)
        for number, (layer, next_norm, layer_kv) in enumerate(zip(self.layers, self.next_norms, kv, strict=True), 1):
            x = layer.attention(x, self.cos_sin, batch, layer_kv)
            if layer is self.layers[-1] and not shown.of_last_layer:  # no later token attends to what comes now
                x, residual = (self.ops.take_rows(y, rows) for y in (x, residual))  # [R, hidden_size]
            x, residual = layer.post_norm.add(x, residual)
            for part in layer.feed_forward(x):
                x, residual = next_norm.add(part, residual)
            if shown:
                shown.leave(number, residual)
        if shown.of_last_layer:
            shown.leave(NORMED, x)
            x = self.ops.take_rows(x, rows)
        return self.lm_head(x, torch.float32)
