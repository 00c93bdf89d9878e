"""How EAGLE-3 heads are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blade import CheckpointError, ModelConfig
from blade_eagle.config import EagleConfig, read_eagle, read_speculators
from blade_eagle.head import EagleHead

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch
    from torch import Tensor

    from blade.contracts import Loader, ReadableModel, Weights

MODULES = re.compile(
    r"(fc|fc_norm\.\d|input_norm|norm|lm_head|embed_tokens|d2t|"
    r"midlayer\.(hidden_norm|input_layernorm|post_attention_layernorm|"
    r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))(\.|$)"
)
UNREAD = ("t2d", "rotary_emb.inv_freq", "midlayer.self_attn.rotary_emb.inv_freq")


class Eagle3:
    """contracts.HeadArchitecture."""

    drafter = "eagle3"

    def configure(self, config: Mapping[str, Any], target: ModelConfig) -> EagleConfig:
        return read_eagle(config, target)

    def build(self, config: EagleConfig, loader: Loader, target: ReadableModel) -> EagleHead:
        return EagleHead(config, loader, target)

    def weights(self, config: Mapping[str, Any], weights: Weights) -> Weights:
        return PublishedWeights(weights)


class SpeculatorsEagle3(Eagle3):
    """The same as vLLM's speculators write it."""

    def configure(self, config: Mapping[str, Any], target: ModelConfig) -> EagleConfig:
        return read_speculators(config, target)


class PublishedWeights:
    """contracts.Weights of a head under the names of EAGLE's own code: others begin them with `model.`, and call the
    layer `layers.0`. Raises CheckpointError for a tensor that is no part of such a head."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._names: dict[str, str] = {}  # ours -> the checkpoint's
        for name in weights.names():
            ours = re.sub(r"^layers\.0\.", "midlayer.", name.removeprefix("model."))
            if ours in UNREAD:
                continue
            if not MODULES.match(ours):
                raise CheckpointError(f"The checkpoint has a tensor {name}, which is no part of an EAGLE-3 head.")
            self._names[ours] = name

    def names(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(self._names[name])

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._weights.get(self._names[name], dtype)

    def release(self, names: Iterable[str]) -> None:
        self._weights.release([self._names[name] for name in names])
