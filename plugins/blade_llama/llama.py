"""The Llama family: the shared decoder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blade.nn import Decoder, DecoderConfig

if TYPE_CHECKING:
    from blade.contracts import Loader


class Llama:
    """contracts.Architecture of `LlamaForCausalLM`."""

    def configure(self, config: Mapping[str, Any]) -> DecoderConfig:
        return DecoderConfig.read(config)

    def build(self, config: DecoderConfig, loader: Loader) -> Decoder:
        return Decoder(config, loader)
