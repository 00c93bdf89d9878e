"""A model that a plugin's command has opened. See blade.contracts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from blade.contracts.devices import Ops
    from blade.contracts.models import Architecture, Weights
    from blade.contracts.text import Tokenizer
    from blade.types import ModelConfig


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """What a command gets of ``open_model(model)``: everything chosen, nothing loaded yet."""

    name: str
    path: Path  # the folder, or the .gguf file
    config: Mapping[str, Any]  # config.json
    architecture: Architecture
    model_config: ModelConfig
    weights: Weights  # as the architecture sees them
    stored: Weights  # all that the files hold
    ops: Ops
    dtype: torch.dtype
    tokenizer: Tokenizer
