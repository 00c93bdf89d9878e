"""The Qwen family: the shared decoder, with biases (Qwen2) or normalised heads (Qwen3), dense or with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blade.nn import Decoder, DecoderConfig, Keys, MixtureConfig, SplitExperts

if TYPE_CHECKING:
    from blade.contracts import Loader, Weights


class Qwen2:
    """contracts.Architecture of `Qwen2ForCausalLM`."""

    def configure(self, config: Mapping[str, Any]) -> DecoderConfig:
        return self.read(Keys(config))

    def read(self, keys: Keys, **fields: Any) -> DecoderConfig:
        """What the keys of the model say; `fields`: what others do, of DecoderConfig."""
        return DecoderConfig.read(keys, **fields)

    def build(self, config: DecoderConfig, loader: Loader) -> Decoder:
        return Decoder(config, loader)


class Qwen3(Qwen2):
    """contracts.Architecture of `Qwen3ForCausalLM`."""

    def read(self, keys: Keys, **fields: Any) -> DecoderConfig:
        return DecoderConfig.read(keys, qk_norm=True, **fields)


class Qwen2Moe(Qwen2):
    """contracts.Architecture of `Qwen2MoeForCausalLM`."""

    def read(self, keys: Keys, **fields: Any) -> DecoderConfig:
        if keys.flag("use_sliding_window", False) and not keys.has("layer_types"):
            keys.refuse("use_sliding_window", "false where no layer_types say which layers slide")
        return DecoderConfig.read(keys, mixture=MixtureConfig.read(keys, shared=True), **fields)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        return SplitExperts(weights)


class Qwen3Moe(Qwen2Moe):
    """contracts.Architecture of `Qwen3MoeForCausalLM`. Where a window slides, it does in all layers."""

    def read(self, keys: Keys, **fields: Any) -> DecoderConfig:
        window = keys.integer("sliding_window") if keys.flag("use_sliding_window", False) else None
        windows = (window,) * keys.num_layers()
        return DecoderConfig.read(keys, qk_norm=True, windows=windows, mixture=MixtureConfig.read(keys), **fields)
