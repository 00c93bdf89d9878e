"""The drafter "mtp": the multi-token prediction heads that Qwen3-Next and Qwen3.5 bring with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blade import CheckpointError, ConfigError, HeadDrafter, hookimpl

if TYPE_CHECKING:
    from blade.contracts import Weights
    from blade_mtp.head import MultiTokenPrediction


def make_drafter(config: Any, draft_model: Any) -> HeadDrafter:
    if draft_model is None:
        raise ConfigError("--drafter mtp has no head to draft with.", "Name the drafter when the model is opened.")
    return HeadDrafter(config, draft_model)


def find_head(config: Mapping[str, Any], weights: Weights) -> MultiTokenPrediction:
    """The head in a model's checkpoint. Raises CheckpointError where there is none."""
    from blade_mtp.head import MultiTokenPrediction

    if not any(name.startswith("mtp.") for name in weights.names()):
        raise CheckpointError(
            "The checkpoint has no multi-token prediction heads, no tensors mtp.*, for --drafter mtp.",
            "Name one of this model that has them with --draft.model, or choose another drafter, such as suffix.",
        )
    return MultiTokenPrediction()


make_drafter.head = find_head  # type: ignore[attr-defined]


@hookimpl
def register_drafters(register: Any) -> None:
    register("mtp", make_drafter)
