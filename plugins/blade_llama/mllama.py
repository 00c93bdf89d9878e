"""Llama 3.2 Vision: its text model, which is Llama 3.1. The layers that attend to an image do nothing without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blade.nn import Decoder, DecoderConfig, Keys, SelectedWeights, located, text_model

if TYPE_CHECKING:
    from blade.contracts import Loader, Weights

PLACES = {  # as Meta publishes it, and as transformers writes it now
    "language_model.model": "language_model.lm_head",
    "model.language_model": "lm_head",
    "model": "lm_head",
}
APART = {
    f"{prefix}{part}.": "vision" for prefix in ("", "model.") for part in ("vision_model", "multi_modal_projector")
}
IMAGE_LAYERS = [3, 8, 13, 18, 23, 28, 33, 38]  # where config.json says nothing
IMAGE_ROWS = 8  # of the embedding, for what stands for an image in a text


class Mllama:
    """contracts.Architecture of the text model of `MllamaForConditionalGeneration`, and of `MllamaForCausalLM`."""

    def configure(self, config: Mapping[str, Any]) -> DecoderConfig:
        keys, fields = text_model(Keys(config))
        keys = keys.with_default("rope_theta", 5e5).with_default("rms_norm_eps", 1e-5)
        skipped = _image_layers(keys)
        num_layers = keys.num_layers() - len(skipped)
        return DecoderConfig.read(
            keys,
            num_layers=num_layers,
            windows=(None,) * num_layers,
            skipped_layers=skipped,
            extra_rows=IMAGE_ROWS,
            **fields,
        )

    def build(self, config: DecoderConfig, loader: Loader) -> Decoder:
        return Decoder(located(config, loader, PLACES), loader)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        layers = sorted(self.configure(config).skipped_layers)
        return SelectedWeights(
            weights, APART | {f"{prefix}.layers.{layer}.": "vision" for prefix in PLACES for layer in layers}
        )


def _image_layers(keys: Keys) -> frozenset[int]:
    num_layers, key = keys.num_layers(), "cross_attention_layers"
    layers = frozenset(keys.integers(key, IMAGE_LAYERS))
    if not layers < frozenset(range(num_layers)):
        keys.refuse(key, f"numbers of some of the {num_layers} layers")
    return layers
