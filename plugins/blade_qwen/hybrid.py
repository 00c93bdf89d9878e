"""Qwen3-Next and Qwen3.5: three gated delta nets to one layer of attention, dense or with experts."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from blade.nn import (
    Decoder,
    DecoderConfig,
    Keys,
    MixtureConfig,
    SelectedWeights,
    SplitExperts,
    TokenMixer,
    located,
    text_model,
)  # fmt: skip
from blade_qwen.delta_net import DeltaConfig, DeltaNet, GroupedDeltaNet

if TYPE_CHECKING:
    from blade.contracts import Loader, Weights

RECURRENT, FULL = "linear_attention", "full_attention"
APART = {"mtp.": "multi-token prediction, for --drafter mtp", "model.visual.": "vision"}
PLACES = {"model.language_model": "lm_head"}
ROTARY_SHARE = 0.25  # of a head's channels, where config.json has no partial_rotary_factor


@dataclass(slots=True, frozen=True, kw_only=True)
class HybridConfig(DecoderConfig):
    """With the sizes of the recurrent layers, which config.state names."""

    delta: DeltaConfig

    @classmethod
    def from_keys(cls, keys: Keys, attention: Seq[str] = (FULL,), **settings: Any) -> Self:
        """From the keys that describe the text model; `attention`: what layer_types may call layers of attention,
        `settings` as in DecoderConfig.read."""
        delta = DeltaConfig.read(keys)
        return cls.read(
            keys,
            qk_norm=True,
            norm_offset=1.0,
            output_gate=True,
            windows=(None,) * keys.num_layers(),
            delta=delta,
            state=delta.state(_recurrent_layers(keys, attention)),
            **settings,
        )


def _recurrent_layers(keys: Keys, attention: Seq[str]) -> tuple[int, ...]:
    num_layers, interval, full = keys.num_layers(), keys.integer("full_attention_interval", 4), attention[0]
    kinds = [full if (i + 1) % interval == 0 else RECURRENT for i in range(num_layers)]
    kinds = keys.texts("layer_types", kinds)
    if len(kinds) != num_layers or not {RECURRENT, *attention}.issuperset(kinds) or {RECURRENT}.issuperset(kinds):
        keys.refuse("layer_types", f"{RECURRENT} or {full}, once for each of {num_layers} layers, one of them {full}")
    return tuple(i for i, kind in enumerate(kinds) if kind == RECURRENT)


class HybridDecoder(Decoder):
    """contracts.Model of both; they differ in how the recurrent layers' projections are stored."""

    config: HybridConfig
    delta_net = DeltaNet

    def token_mixer(self, name: str, index: int, loader: Loader) -> TokenMixer:
        config = self.config
        if config.state and index in config.state.layers:
            return self.delta_net(f"{name}.linear_attn", config, config.delta, loader)
        return super().token_mixer(name, index, loader)


class Qwen3NextDecoder(HybridDecoder):
    delta_net = GroupedDeltaNet


class Qwen3Next:
    """contracts.Architecture of `Qwen3NextForCausalLM`."""

    def configure(self, config: Mapping[str, Any]) -> HybridConfig:
        keys = Keys(config).with_default("partial_rotary_factor", ROTARY_SHARE)
        mixture = MixtureConfig.read(keys, normalize=True, shared=True)
        return HybridConfig.from_keys(keys, mixture=mixture)

    def build(self, config: HybridConfig, loader: Loader) -> HybridDecoder:
        return Qwen3NextDecoder(config, loader)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        return SplitExperts(SelectedWeights(weights, APART))


class Qwen35:
    """contracts.Architecture of `Qwen3_5ForCausalLM`, and of the text model of `Qwen3_5ForConditionalGeneration`, whose
    config.json has it in a section and whose tensors have a longer name."""

    def configure(self, config: Mapping[str, Any]) -> HybridConfig:
        keys, fields = text_model(Keys(config))
        keys = keys.with_default("partial_rotary_factor", ROTARY_SHARE)
        return HybridConfig.from_keys(keys, **fields, **self.feed_forward(keys))

    def feed_forward(self, keys: Keys) -> dict[str, Any]:
        """What the text model's keys say of it: fields of HybridConfig."""
        return {}

    def build(self, config: HybridConfig, loader: Loader) -> HybridDecoder:
        return HybridDecoder(located(config, loader, PLACES), loader)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        return SplitExperts(SelectedWeights(weights, APART))


class Qwen35Moe(Qwen35):
    """contracts.Architecture of `Qwen3_5MoeForCausalLM` and `Qwen3_5MoeForConditionalGeneration`."""

    def feed_forward(self, keys: Keys) -> dict[str, Any]:
        mixture = MixtureConfig.read(keys, normalize=True, shared=True)
        return {"mixture": mixture, "intermediate_size": mixture.intermediate_size}
