"""Qwen4-Exp: Qwen3.5's layers with experts between hyper-connections, some with embeddings of n-grams.

Its layers of attention choose which keys a query sees. Where the budget covers the whole context all are chosen, and
what would choose is not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from blade import CheckpointError, StateSpec
from blade.nn import (
    Keys,
    Mixture,
    MixtureConfig,
    SelectedWeights,
    SelfAttention,
    SplitExperts,
    TokenMixer,
    text_model,
)  # fmt: skip
from blade_qwen.delta_net import DeltaNet
from blade_qwen.hybrid import FULL, RECURRENT, HybridConfig
from blade_qwen.hyper_connection import HyperConnection, StreamReader, StreamsConfig
from blade_qwen.indexed_attention import IndexedAttention, read_selection
from blade_qwen.ngram_config import NgramConfig
from blade_qwen.ngram_embedding import NgramEmbedding
from blade_qwen.ngram_shards import JoinedShards

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch, KVCache
    from blade.contracts import Loader, Weights

INDEXED = "indexed_attention"  # transformers' name of what published files call full_attention
INDEXER = ".self_attn.indexer."
APART = {"mtp.": "multi-token prediction", "model.visual.": "vision"}


@dataclass(slots=True, frozen=True, kw_only=True)
class Qwen4ExpConfig(HybridConfig):
    state: StateSpec
    mixture: MixtureConfig
    streams: StreamsConfig
    ngrams: NgramConfig | None
    sigmoid_gate: bool  # of the recurrent layers' outputs; else silu


class Qwen4Exp:
    """contracts.Architecture of `Qwen4ExpForCausalLM`, and of the text model of `Qwen4ExpForConditionalGeneration`."""

    def configure(self, config: Mapping[str, Any]) -> Qwen4ExpConfig:
        keys, fields = text_model(Keys(config))
        mixture = MixtureConfig.read(keys, normalize=True, shared=True)
        found = Qwen4ExpConfig.from_keys(
            keys,
            attention=(FULL, INDEXED),
            **fields,
            mixture=mixture,
            intermediate_size=mixture.intermediate_size,
            streams=StreamsConfig.read(keys),
            ngrams=NgramConfig.read(keys),
            sigmoid_gate=_gate(keys) == "sigmoid",
        )
        return replace(found, key_selection=read_selection(keys, found), state=_state(keys, found))

    def build(self, config: Qwen4ExpConfig, loader: Loader) -> Qwen4ExpDecoder:
        nested = loader.has("model.language_model.hyper_connection_mixer.hc_norm.weight")
        return Qwen4ExpDecoder(replace(config, prefix="model.language_model") if nested else config, loader)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        if self.configure(config).key_selection is not None:
            return SplitExperts(JoinedShards(SelectedWeights(weights, APART)))
        indexers = {name[: name.index(INDEXER) + len(INDEXER)] for name in weights.names() if INDEXER in name}
        apart = APART | dict.fromkeys(sorted(indexers), "sparse attention's indexers")
        return SplitExperts(JoinedShards(SelectedWeights(weights, apart)))


def _gate(keys: Keys) -> str:
    gate = keys.text("output_gate_type", "silu")
    if gate not in ("silu", "sigmoid"):
        keys.refuse("output_gate_type", "silu or sigmoid")
    return gate


def _state(keys: Keys, config: Qwen4ExpConfig) -> StateSpec:
    """All recurrent layers have room for what n-grams need, though few keep any: it is little beside their sums."""
    state, ngrams = config.state, config.ngrams
    if ngrams is None:
        return state
    if not set(state.layers).issuperset(ngrams.layers):
        keys.refuse("ple_layer_ids", f"numbers of layers of {RECURRENT}, counted from 1")
    return replace(state, tensors=(*state.tensors, *ngrams.state(config.streams.num * config.hidden_size)))


class SigmoidDeltaNet(DeltaNet):
    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.ops.sigmoid_mul(self.ops.rms_norm(y, self.norm, self.eps).flatten(1), gate.flatten(1))


class Qwen4ExpLayer:
    """An embedding of n-grams, where the layer has one; a part that mixes tokens; a mixture of experts."""

    def __init__(self, name: str, index: int, config: Qwen4ExpConfig, loader: Loader) -> None:
        streams, ngrams = config.streams, config.ngrams
        self.ngrams: NgramEmbedding | None = None
        if ngrams is not None and index in ngrams.layers:
            place = ngrams.layers.index(index)
            self.ngrams = NgramEmbedding(f"{name}.ple", place, ngrams, streams, config, loader)
        self.around_tokens = HyperConnection(f"{name}.attn_hyper_connection", streams, config, loader)
        self.is_recurrent = index in config.state.layers
        if self.is_recurrent:
            kind = SigmoidDeltaNet if config.sigmoid_gate else DeltaNet
            self.token_mixer: TokenMixer = kind(f"{name}.linear_attn", config, config.delta, loader)
        elif config.key_selection is not None:
            self.token_mixer = IndexedAttention(f"{name}.self_attn", config, config.key_selection, loader)
        else:
            self.token_mixer = SelfAttention(f"{name}.self_attn", config, None, loader)
        self.around_channels = HyperConnection(f"{name}.mlp_hyper_connection", streams, config, loader)
        self.channel_mixer = Mixture(f"{name}.mlp", config.mixture, config.hidden_size, loader)

    def mix_tokens(self, streams: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: Any) -> Tensor:
        """streams [T, num, hidden_size] -> the same."""
        if self.is_recurrent:
            layer_kv, kept = layer_kv[:2], layer_kv[2:]
            if self.ngrams is not None:
                streams = streams + self.ngrams(streams, batch, *kept)
        x, strengths = self.around_tokens.read(streams)
        return streams + strengths * self.token_mixer(x, cos_sin, batch, layer_kv).unsqueeze(1)

    def mix_channels(self, streams: Tensor) -> Tensor:
        """streams [R, num, hidden_size] -> the same."""
        x, strengths = self.around_channels.read(streams)
        shared, mixed = self.channel_mixer(x)
        return streams + strengths * (shared + mixed).unsqueeze(1)


class Qwen4ExpDecoder:
    """contracts.Model."""

    def __init__(self, config: Qwen4ExpConfig, loader: Loader) -> None:
        self.config, self.ops = config, loader.ops
        shape = (config.vocab_size, config.hidden_size)
        table, layers = (f"{config.prefix}.{name}" for name in ("embed_tokens", "layers"))
        tied = config.tied and not loader.has(f"{config.head}.weight")
        self.lm_head = loader.linear(table if tied else config.head, shapes=[shape])
        self.embed = loader.embedding(table, shape, self.lm_head if tied else None)
        self.layers = [Qwen4ExpLayer(f"{layers}.{i}", i, config, loader) for i in range(config.num_layers)]
        if loader.has(more := f"{layers}.{config.num_layers}.attn_hyper_connection.hc_norm.weight"):
            raise CheckpointError(
                f"config.json: num_hidden_layers is {config.num_layers}, but there is a tensor {more}."
            )
        self.reader = StreamReader(f"{config.prefix}.hyper_connection_mixer", config.streams, config, loader)
        self.cos_sin = loader.ops.to_device(config.rope_table())

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """See contracts.Model."""
        streams = self.embed(batch.input_ids).unsqueeze(1).expand(-1, self.config.streams.num, -1)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            streams = layer.mix_tokens(streams, self.cos_sin, batch, layer_kv)
            if layer is self.layers[-1]:  # no later token attends to what comes now
                streams = self.ops.take_rows(streams.flatten(1), batch.logits_rows).view(-1, *streams.shape[1:])
            streams = layer.mix_channels(streams)
        return self.lm_head(self.reader(streams), torch.float32)
