"""Llama 4, its text model: experts whose input is weighed, and layers of attention without positions between those with
rotary ones (iRoPE), which attend within chunks of positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from blade.nn import (
    ChannelMixer,
    Decoder,
    DecoderConfig,
    FeedForward,
    Keys,
    LongRope,
    MixtureConfig,
    SelectedWeights,
    SelfAttention,
    SplitExperts,
    TokenMixer,
    YarnRope,
    load_experts,
    located,
    text_model,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch
    from blade.contracts import Loader, Weights

APART = {"vision_model.": "vision", "multi_modal_projector.": "vision"}
PLACES = {"language_model.model": "language_model.lm_head"}
THETA = 500000.0  # of the rope, where config.json has none
CHUNK = 8192  # positions that attention is confined to, where config.json says nothing


@dataclass(slots=True, frozen=True, kw_only=True)
class Llama4Config(DecoderConfig):
    rotary_layers: frozenset[int]  # the others' queries and keys know no positions
    chunked_layers: frozenset[int]  # attend within `attention_chunk` positions
    normalized: bool  # queries and keys of rotary layers are
    temperature: tuple[float, int] | None  # of the others' queries: how much it rises, and per how many tokens


class Llama4:
    """contracts.Architecture of `Llama4ForCausalLM`, and of the text model of `Llama4ForConditionalGeneration`, whose
    config.json has it in a section and whose tensors have a longer name.
    """

    def configure(self, config: Mapping[str, Any]) -> Llama4Config:
        keys, fields = text_model(Keys(config))
        keys = keys.with_default("rope_theta", THETA).with_default("rms_norm_eps", 1e-5)
        num_layers = keys.num_layers()
        rotary = _rotary_layers(keys, num_layers)
        temperature = (keys.number("attn_scale", 0.1), keys.integer("floor_scale", CHUNK))
        found = Llama4Config.read(
            keys,
            **fields,
            intermediate_size=keys.integer("intermediate_size_mlp"),
            windows=(None,) * num_layers,
            mixture=_mixture(keys, num_layers),
            rotary_layers=rotary,
            chunked_layers=_chunked_layers(keys, num_layers, rotary),
            attention_chunk=keys.integer("attention_chunk_size", CHUNK),
            normalized=keys.flag("use_qk_norm", True),
            temperature=temperature if keys.flag("attn_temperature_tuning", True) else None,
        )
        if found.head_dim % 2:
            keys.refuse("head_dim", "even: neighbouring channels turn together")
        if isinstance(found.rope, YarnRope | LongRope) and found.normalized:
            keys.refuse(
                "rope_scaling" if keys.has("rope_scaling") else "rope_parameters", "of a kind that changes no lengths"
            )
        return found if found.chunked_layers else replace(found, attention_chunk=None)

    def build(self, config: Llama4Config, loader: Loader) -> Llama4Decoder:
        return Llama4Decoder(located(config, loader, PLACES), loader)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        return SplitExperts(SelectedWeights(weights, APART), transposed=True)


def _rotary_layers(keys: Keys, num_layers: int) -> frozenset[int]:
    interval = keys.integer("no_rope_layer_interval", 4)
    flags = keys.integers("no_rope_layers", []) or [int((i + 1) % interval != 0) for i in range(num_layers)]
    if len(flags) < num_layers or not {0, 1}.issuperset(flags):
        keys.refuse("no_rope_layers", f"0 or 1 for each of {num_layers} layers")
    return frozenset(i for i in range(num_layers) if flags[i])


def _mixture(keys: Keys, num_layers: int) -> MixtureConfig:
    step = keys.integer("interleave_moe_layer_step", 1)
    num_experts, num_active = keys.num_experts("num_local_experts"), keys.integer("num_experts_per_tok", 1)
    if num_active > num_experts:
        keys.refuse("num_experts_per_tok", f"at most the {num_experts} experts there are")
    inner = keys.integer("intermediate_size")
    layers = frozenset(keys.integers("moe_layers", list(range(step - 1, num_layers, step))))
    return MixtureConfig(layers, num_experts, num_active, inner, inner, normalize=False)


def _chunked_layers(keys: Keys, num_layers: int, rotary: frozenset[int]) -> frozenset[int]:
    default = ["chunked_attention" if i in rotary else "full_attention" for i in range(num_layers)]
    kinds = keys.texts("layer_types", default)
    if len(kinds) < num_layers or not {"chunked_attention", "full_attention"}.issuperset(kinds):
        keys.refuse("layer_types", f"chunked_attention or full_attention for each of {num_layers} layers")
    return frozenset(i for i in range(num_layers) if kinds[i] == "chunked_attention")


class Llama4Decoder(Decoder):
    """contracts.Model."""

    config: Llama4Config

    def token_mixer(self, name: str, index: int, loader: Loader) -> TokenMixer:
        config = self.config
        kind = RotaryAttention if index in config.rotary_layers else PlainAttention
        attention = kind(f"{name}.self_attn", config, loader)
        if index in config.chunked_layers and config.attention_chunk and config.max_context > config.attention_chunk:
            attention.chunk = config.attention_chunk
        return attention

    def channel_mixer(self, name: str, index: int, loader: Loader) -> ChannelMixer:
        config, mixture = self.config, self.config.mixture
        if mixture and index in mixture.layers:
            return InputWeighedMixture(f"{name}.feed_forward", mixture, config.hidden_size, loader)
        return FeedForward(f"{name}.feed_forward", config.intermediate_size, config.hidden_size, loader)


class RotaryAttention(SelfAttention):
    """Neighbouring channels of a head turn together, which then has length 1 (times sqrt(head_dim))."""

    def __init__(self, name: str, config: Llama4Config, loader: Loader) -> None:
        super().__init__(name, config, None, loader)
        if config.normalized:  # before they are rotated, which changes no length
            self.q_norm = self.k_norm = UnitNorm(self.head_dim, config.rms_norm_eps, loader)

    def row_order(self) -> Tensor:
        """Each head's even rows of queries and keys before its odd ones: halves of a head turn together."""
        num_queries, _, num_keys, num_values = self.heads
        rows = torch.arange(sum(self.heads) * self.head_dim)
        turning, others = rows.split_with_sizes([(num_queries + num_keys) * self.head_dim, num_values * self.head_dim])
        return torch.cat((turning.view(-1, self.head_dim // 2, 2).transpose(1, 2).flatten(), others))


class UnitNorm:
    """Root mean square norm without weights."""

    def __init__(self, width: int, eps: float, loader: Loader) -> None:
        self.ops, self.eps = loader.ops, eps
        self.ones = loader.ops.to_device(torch.ones(width, dtype=loader.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.ones, self.eps)


class PlainAttention(SelfAttention):
    """Without positions; queries far behind the beginning are sharpened (Nakanishi 2025)."""

    def __init__(self, name: str, config: Llama4Config, loader: Loader) -> None:
        super().__init__(name, config, None, loader)
        still = torch.cat((torch.ones(config.max_context, 2), torch.zeros(config.max_context, 2)), dim=1)
        self.still = loader.ops.to_device(still)  # a rope that turns nothing
        if config.temperature and config.max_context > config.temperature[1]:
            rise, per = config.temperature
            steps = torch.floor((torch.arange(config.max_context) + 1) / per)
            self.sharpness = loader.ops.to_device(torch.log1p(steps) * rise + 1)

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: object) -> Tensor:
        return super().__call__(x, self.still, batch, layer_kv)


class InputWeighedMixture:
    """blade.nn.ChannelMixer: experts get a token weighed by the router's sigmoid; one expert gets all as it is."""

    def __init__(self, name: str, config: MixtureConfig, hidden_size: int, loader: Loader) -> None:
        self.ops, self.num_active = loader.ops, config.num_active
        self.router = loader.linear(f"{name}.router", shapes=[(config.num_experts, hidden_size)])
        inner = config.intermediate_size
        self.experts = load_experts(f"{name}.experts", config.num_experts, inner, hidden_size, loader)
        self.shared = FeedForward(f"{name}.shared_expert", inner, hidden_size, loader)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, hidden_size] -> what is to be added up, [T, hidden_size] each."""
        ids, weights = self.ops.route(self.router(x, torch.float32), self.num_active, False, sigmoid=True)
        return (*self.shared(x), self.experts(x, ids, weights, weigh_input=True))
