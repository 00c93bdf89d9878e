"""Multi-token prediction (Gloeckle et al. 2024; sequential, as in DeepSeek-AI 2024) as Qwen3-Next and Qwen3.5 have it:
one layer of the model's own kind, with attention, over a token's embedding joined with the hidden state of the token
before it. It shares the model's embedding and output matrix, and is applied again and again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from blade import CheckpointError, ModelConfig
from blade.contracts import NORMED
from blade.nn import DecoderConfig, FeedForward, Keys, Layer, Mixture, NamedWeights, Norm, SelfAttention, SplitExperts

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch, KVCache
    from blade.contracts import Loader, ReadableModel, Weights
    from blade.nn import ChannelMixer

PREFIX, LAYER = "mtp.", "mtp.layers.0"
MODULES = re.compile(r"mtp\.(fc|norm|pre_fc_norm_(embedding|hidden)|layers\.0\..+)(\.|$)")


class MultiTokenPrediction:
    """contracts.HeadArchitecture."""

    drafter = "mtp"

    def configure(self, config: Mapping[str, Any], target: ModelConfig) -> DecoderConfig:
        """The model's own, with one layer of attention."""
        keys = Keys(config).of_text()
        if keys.integer("mtp_num_hidden_layers", 1) != 1:
            keys.refuse("mtp_num_hidden_layers", "1: heads of one layer are served")
        if not isinstance(target, DecoderConfig):
            raise CheckpointError(f"{target.architecture} is not of the kind that --drafter mtp reads the heads of.")
        mixture = target.mixture and replace(target.mixture, layers=frozenset({0}))
        return replace(target, num_layers=1, windows=(None,), state=None, mixture=mixture)

    def build(self, config: DecoderConfig, loader: Loader, target: ReadableModel) -> MTPHead:
        return MTPHead(config, loader, target)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        return SplitExperts(_own_weights(weights))


def _own_weights(weights: Weights) -> Weights:
    """The head's alone. Raises CheckpointError for a tensor that is not known."""
    names = [name for name in weights.names() if name.startswith(PREFIX)]
    if unknown := next((name for name in names if not MODULES.match(name)), None):
        raise CheckpointError(f"The checkpoint has a tensor {unknown}, which --drafter mtp does not know.")
    return NamedWeights(weights, names)


class MTPHead:
    """contracts.Head."""

    hidden_states = (NORMED,)
    target_ids = None

    def __init__(self, config: DecoderConfig, loader: Loader, target: ReadableModel) -> None:
        self.config, self.ops, self.dtype = config, loader.ops, loader.dtype
        self.width, self.target = config.hidden_size, target
        rest = config.hidden_size, config.rms_norm_eps, loader, config.norm_offset
        self.embedding_norm = Norm("mtp.pre_fc_norm_embedding", *rest)
        self.hidden_norm = Norm("mtp.pre_fc_norm_hidden", *rest)
        self.fc = loader.linear("mtp.fc", shapes=[(self.width, 2 * self.width)])
        attention = SelfAttention(f"{LAYER}.self_attn", config, None, loader)
        self.layer = Layer(LAYER, config, attention, _channel_mixer(config, loader), loader)
        self.norm = Norm("mtp.norm", *rest)
        self.cos_sin = loader.ops.to_device(config.rope_table())

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden.clone()

    def forward(self, batch: Batch, states: Tensor, kv: KVCache) -> tuple[Tensor, Tensor]:
        joined = states.new_empty(len(states), 2 * self.width)
        self.ops.copy_rows(self.embedding_norm(self.target.embed(batch.input_ids)), joined[:, : self.width])
        self.ops.copy_rows(self.hidden_norm(states), joined[:, self.width :])
        residual = self.fc(joined)
        x = self.layer.attention(self.layer.input_norm(residual), self.cos_sin, batch, kv[0])
        x, residual = (self.ops.take_rows(y, batch.logits_rows) for y in (x, residual))  # [R, width]
        x, residual = self.layer.post_norm.add(x, residual)
        for part in self.layer.feed_forward(x):
            x, residual = self.norm.add(part, residual)
        return self.target.lm_head(x, torch.float32), x


def _channel_mixer(config: DecoderConfig, loader: Loader) -> ChannelMixer:
    """A mixture of experts where the checkpoint has a router."""
    if config.mixture and loader.has(f"{LAYER}.mlp.gate.weight"):
        return Mixture(f"{LAYER}.mlp", config.mixture, config.hidden_size, loader)
    return FeedForward(f"{LAYER}.mlp", config.intermediate_size, config.hidden_size, loader)
