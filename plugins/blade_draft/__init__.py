"""The drafter "model": a smaller model of the same vocabulary (``--draft.model``)."""

from typing import Any

from blade import ConfigError, hookimpl


@hookimpl
def register_drafters(register: Any) -> None:
    def make(config: Any, draft_model: Any) -> Any:
        from blade_draft.drafter import ModelDrafter

        if draft_model is None:
            raise ConfigError("--drafter model has no model to draft with.", "Name one with --draft.model.")
        return ModelDrafter(config, draft_model)

    register("model", make)
