"""Models that see (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) or hear as well (the thinkers of Qwen2.5-Omni and Qwen3-Omni): their
text models, which are Qwen2, Qwen3 and Qwen3-MoE.

Their rope has an axis for time and two for places (Wang et al. 2024); text has the same position on all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from blade.nn import Decoder, DecoderConfig, Keys, SelectedWeights, SplitExperts, located, text_model
from blade_qwen.qwen import Qwen2, Qwen3, Qwen3Moe

if TYPE_CHECKING:
    from blade.contracts import Loader, Weights

ROOTS = ("", "thinker.")  # of names, the latter where a talker is beside it
PLACES = {f"{root}{prefix}": f"{root}lm_head" for root in ROOTS for prefix in ("model.language_model", "model")}
APART = {
    f"{root}{prefix}{part}.": what
    for root in ROOTS
    for prefix in ("", "model.")  # as transformers writes them now, and did before
    for part, what in (("visual", "vision"), ("audio_tower", "hearing"))
} | {"talker.": "speech", "token2wav.": "speech", "code2wav.": "speech"}


class Qwen2VL:
    """contracts.Architecture of the text model of `Qwen2VLForConditionalGeneration` and
    `Qwen2_5_VLForConditionalGeneration`, whose config.json may have it in a section and whose tensors may have a longer
    name."""

    family: Qwen2 = Qwen2()
    defaults: Mapping[str, Any] = MappingProxyType({"rope_theta": 1e6, "rms_norm_eps": 1e-5})  # of absent keys

    def configure(self, config: Mapping[str, Any]) -> DecoderConfig:
        keys, fields = text_model(Keys(config))
        for key, value in self.defaults.items():
            keys = keys.with_default(key, value)
        return self.family.read(keys, **fields)

    def build(self, config: DecoderConfig, loader: Loader) -> Decoder:
        return self.family.build(located(config, loader, PLACES), loader)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        return SelectedWeights(weights, APART)


class Qwen25Omni(Qwen2VL):
    """contracts.Architecture of the text model of `Qwen2_5OmniForConditionalGeneration`, once called
    `Qwen2_5OmniModel`."""

    defaults = MappingProxyType({"rope_theta": 1e6})


class Qwen3VL(Qwen2VL):
    """contracts.Architecture of the text model of `Qwen3VLForConditionalGeneration`."""

    family = Qwen3()
    defaults = MappingProxyType({"rope_theta": 5e5})


class Qwen3VLMoe(Qwen2VL):
    """contracts.Architecture of the text model of `Qwen3VLMoeForConditionalGeneration`. All experts of a layer are in
    two tensors, which Qwen publishes transposed and transformers 5 writes as it holds them."""

    family = Qwen3Moe()
    defaults = MappingProxyType({"rope_theta": 5e5, "norm_topk_prob": True})

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        selected = super().weights(config, weights)
        return SplitExperts(selected, _are_transposed(self.configure(config), selected), adapted=False)


class Qwen3OmniMoe(Qwen3VLMoe):
    """contracts.Architecture of the text model of `Qwen3OmniMoeForConditionalGeneration`."""

    defaults = MappingProxyType({"rope_theta": 1e6, "norm_topk_prob": True})


def _are_transposed(config: DecoderConfig, weights: Weights) -> bool:
    """Whether all experts in one tensor are [E, D, 2 I] and [E, I, D]. One of the two may be of squares, which say
    nothing, but not both."""
    inner = config.mixture.intermediate_size if config.mixture else 0
    shapes = {"gate_up_proj": (config.hidden_size, 2 * inner), "down_proj": (inner, config.hidden_size)}
    kinds = [(name, name.rpartition(".experts.")[2]) for name in weights.names()]
    return all(tuple(weights.shape(name)[1:]) == shapes[kind] for name, kind in kinds if kind in shapes)
