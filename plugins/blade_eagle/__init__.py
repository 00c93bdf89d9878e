"""The drafter "eagle3": heads of EAGLE-3 (Li et al. 2025), which read three of the model's hidden states
(``--draft.model``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade import ConfigError, HeadDrafter, hookimpl

if TYPE_CHECKING:
    from blade_eagle.architecture import Eagle3, SpeculatorsEagle3

# As EAGLE's own tools, SpecForge, SGLang and vLLM name them.
NAMES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
SPECULATORS_NAMES = ("Eagle3Speculator", "Eagle3DraftModel")


def make_eagle3() -> Eagle3:
    from blade_eagle.architecture import Eagle3

    return Eagle3()


def make_speculators_eagle3() -> SpeculatorsEagle3:
    from blade_eagle.architecture import SpeculatorsEagle3

    return SpeculatorsEagle3()


@hookimpl
def register_models(register: Any) -> None:
    for name in NAMES:
        register(name, make_eagle3)
    for name in SPECULATORS_NAMES:
        register(name, make_speculators_eagle3)


def make_drafter(config: Any, draft_model: Any) -> HeadDrafter:
    if draft_model is None:
        raise ConfigError("--drafter eagle3 has no head to draft with.", "Name one with --draft.model.")
    return HeadDrafter(config, draft_model)


# EAGLE's own checkpoints call themselves LlamaForCausalLM: who names this drafter says what they are.
make_drafter.draft_architectures = (*NAMES, *SPECULATORS_NAMES)  # type: ignore[attr-defined]


@hookimpl
def register_drafters(register: Any) -> None:
    register("eagle3", make_drafter)
