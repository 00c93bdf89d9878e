"""The Qwen family: the shared decoder, with biases (Qwen2) or normalised heads (Qwen3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blade.nn import Decoder, DecoderConfig

if TYPE_CHECKING:
    from blade.contracts import Loader


class Qwen2:
    """contracts.Architecture of `Qwen2ForCausalLM`."""

    def configure(self, config: Mapping[str, Any]) -> DecoderConfig:
        return DecoderConfig.read(config)

    def build(self, config: DecoderConfig, loader: Loader) -> Decoder:
        return Decoder(config, loader)


class Qwen3(Qwen2):
    """contracts.Architecture of `Qwen3ForCausalLM`."""

    def configure(self, config: Mapping[str, Any]) -> DecoderConfig:
        return DecoderConfig.read(config, qk_norm=True)
