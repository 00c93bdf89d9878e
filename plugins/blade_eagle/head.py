"""EAGLE-3 (Li et al. 2025, "Scaling up inference acceleration of large language models via training-time test"): one
layer over the embedding of a token beside the joined hidden states of the token before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade import CheckpointError
from blade.nn import FeedForward, Norm, SelfAttention

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade import Batch, KVCache
    from blade.contracts import Linear, Loader, ReadableModel
    from blade_eagle.config import EagleConfig

LAYER = "midlayer"


class WideAttention(SelfAttention):
    """Its queries, keys and values come from the embedding and the state, side by side."""

    def projections(
        self, name: str, qkv: Seq[tuple[int, int]], o: tuple[int, int], loader: Loader
    ) -> tuple[Linear, Linear]:
        return super().projections(name, [(n, 2 * k) for n, k in qkv], o, loader)


class EagleHead:
    """contracts.Head."""

    def __init__(self, config: EagleConfig, loader: Loader, target: ReadableModel) -> None:
        self.config, self.ops, self.dtype = config, loader.ops, loader.dtype
        self.hidden_states, self.width = config.hidden_states, config.hidden_size
        self.joined = Joined(config, loader)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed = _embedding(config, loader, target)
        self.input_norm = Norm(f"{LAYER}.input_layernorm", width, eps, loader)
        self.hidden_norm = Norm(f"{LAYER}.hidden_norm", width, eps, loader)
        self.attention = WideAttention(f"{LAYER}.self_attn", config, config.windows[0], loader)
        self.post_norm = Norm(f"{LAYER}.post_attention_layernorm", width, eps, loader)
        self.feed_forward = FeedForward(f"{LAYER}.mlp", config.intermediate_size, width, loader)
        self.norm = Norm("norm", width, eps, loader)
        self.lm_head = _output_matrix(config, loader, target)
        self.target_ids = _target_ids(config, loader)
        self.cos_sin = loader.ops.to_device(config.rope_table())

    def enter(self, hidden: Tensor) -> Tensor:
        return self.joined(hidden)

    def forward(self, batch: Batch, states: Tensor, kv: KVCache) -> tuple[Tensor, Tensor]:
        normed = self.hidden_norm(states)
        x = states.new_empty(len(states), 2 * self.width)
        self.ops.copy_rows(self.input_norm(self.embed(batch.input_ids)), x[:, : self.width])
        self.ops.copy_rows(normed, x[:, self.width :])
        x = self.attention(x, self.cos_sin, batch, kv[0])
        residual = normed if self.config.norm_before_residual else states
        x, residual = (self.ops.take_rows(y, batch.logits_rows) for y in (x, residual))  # [R, width]
        x, residual = self.post_norm.add(x, residual)
        for part in self.feed_forward(x):
            x, residual = self.norm.add(part, residual)
        return self.lm_head(x, torch.float32), x if self.config.norm_output else residual


class Joined:
    """The model's hidden states as one state of the head."""

    def __init__(self, config: EagleConfig, loader: Loader) -> None:
        size, num = config.target_hidden_size, len(config.hidden_states)
        self.size = size
        self.fc = loader.linear("fc", shapes=[(config.hidden_size, num * size)])
        self.norm: Norm | None = None
        self.norms: list[Norm] = []
        if config.norm_before_fc:
            self.norm = Norm("input_norm", num * size, config.rms_norm_eps, loader)
        if config.fc_norm:
            self.norms = [Norm(f"fc_norm.{i}", size, config.rms_norm_eps, loader) for i in range(num)]

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.norms:
            parts = torch.split_with_sizes(hidden, [self.size] * len(self.norms), dim=1)
            hidden = torch.cat([norm(part.contiguous()) for norm, part in zip(self.norms, parts, strict=True)], dim=1)
        return self.fc(self.norm(hidden) if self.norm else hidden)


def _embedding(config: EagleConfig, loader: Loader, target: ReadableModel) -> Callable[[Tensor], Tensor]:
    if loader.has("embed_tokens.weight"):
        return loader.embedding("embed_tokens", (config.vocab_size, config.hidden_size))
    if config.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"The EAGLE-3 head has no embedding, and its states have {config.hidden_size} numbers, those of the model "
            f"{target.hidden_size}.",
            "Use the head that was trained for this model.",
        )
    return target.embed


def _output_matrix(config: EagleConfig, loader: Loader, target: ReadableModel) -> Linear:
    shape = (config.draft_vocab_size, config.hidden_size)
    if loader.has("lm_head.weight"):
        return loader.linear("lm_head", shapes=[shape])
    if shape != (config.vocab_size, target.hidden_size):
        raise CheckpointError("The EAGLE-3 head has no lm_head.weight, and the model's is of another shape.")
    if config.tied and loader.has("embed_tokens.weight"):
        return loader.linear("embed_tokens", shapes=[shape])
    return target.lm_head


def _target_ids(config: EagleConfig, loader: Loader) -> Tensor | None:
    """d2t says how much larger the model's id is than the head's."""
    size = config.draft_vocab_size
    if not loader.has("d2t"):
        if size != config.vocab_size:
            raise CheckpointError(f"The EAGLE-3 head knows {size} of {config.vocab_size} tokens, and has no d2t.")
        return None
    places = torch.arange(size)
    ids = loader.tensor("d2t", (size,), torch.int64).cpu() + places
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or len(set(ids.tolist())) < size:
        raise CheckpointError("The EAGLE-3 head's d2t names a token that the model does not have, or one twice.")
    return None if torch.equal(ids, torch.arange(config.vocab_size)) else loader.ops.to_device(ids)
