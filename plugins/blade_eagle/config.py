"""config.json of EAGLE-3 heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from blade import CheckpointError, ModelConfig
from blade.nn import DecoderConfig, Keys

NUM_STATES = 3  # low, middle and high


@dataclass(slots=True, frozen=True, kw_only=True)
class EagleConfig(DecoderConfig):
    """Of the head's one layer; vocab_size is the model's."""

    draft_vocab_size: int  # ids that the head can say
    target_hidden_size: int
    hidden_states: tuple[int, ...]  # which of the model's it reads
    norm_before_residual: bool  # the residual stream begins with the normalised state
    norm_before_fc: bool  # the states are normalised together before they are joined
    fc_norm: bool  # they are normalised each by itself
    norm_output: bool  # the state that is gone on from is normalised


def read(whole: Keys, layer: Keys, target: ModelConfig, hidden_states: list[int], norm_first: bool) -> EagleConfig:
    """`layer`: the keys that describe the layer. `hidden_states`: as config.json has them; the published default
    where it has none. `norm_first`: norm_before_residual where nothing is said. Raises CheckpointError for a head of
    another model."""
    if layer.integer("num_hidden_layers", 1) != 1:
        layer.refuse("num_hidden_layers", "1: heads of one layer are served")
    layer = layer.with_default("num_hidden_layers", 1).with_default("architectures", ["LlamaForCausalLMEagle3"])
    if layer.integer("vocab_size") != target.vocab_size:
        layer.refuse("vocab_size", f"{target.vocab_size}, as that of the model it is to draft for")
    hidden_size = layer.integer("hidden_size")
    found = EagleConfig.read(
        layer,
        draft_vocab_size=whole.integer("draft_vocab_size", target.vocab_size),
        target_hidden_size=whole.integer("target_hidden_size", hidden_size),
        hidden_states=tuple(sorted(hidden_states or _default_states(target.num_layers))),  # as layers come
        norm_before_residual=whole.flag("norm_before_residual", norm_first),
        norm_before_fc=whole.flag("norm_before_fc", False),
        fc_norm=whole.flag("fc_norm", False),
        norm_output=whole.flag("norm_output", False),
    )
    _check_target(whole, found, target)
    return replace(found, max_context=max(found.max_context, target.max_context))  # ropes go on, as in EAGLE's own code


def _default_states(num_layers: int) -> list[int]:
    return [2, num_layers // 2, num_layers - 3]


def _check_target(keys: Keys, found: EagleConfig, target: ModelConfig) -> None:
    size = getattr(target, "hidden_size", found.target_hidden_size)
    if found.target_hidden_size != size:
        raise CheckpointError(
            f"The EAGLE-3 head reads hidden states of {found.target_hidden_size} numbers, and those of "
            f"{target.architecture} have {size}.",
            "Use the head that was trained for this model.",
        )
    if not found.draft_vocab_size <= found.vocab_size:
        keys.refuse("draft_vocab_size", f"at most the vocabulary's {found.vocab_size}")
    if not all(0 <= state <= target.num_layers for state in found.hidden_states):
        raise CheckpointError(
            f"The EAGLE-3 head reads the states after {', '.join(map(str, found.hidden_states))} layers, and "
            f"{target.architecture} has {target.num_layers}.",
            "Use the head that was trained for this model.",
        )


def read_eagle(config: Mapping[str, Any], target: ModelConfig) -> EagleConfig:
    """As EAGLE's own code, SpecForge and SGLang write it. SGLang counts layers from 0, and names the one whose output
    is read."""
    keys = Keys(config)
    states = [layer + 1 for layer in keys.section("eagle_config").integers("eagle_aux_hidden_state_layer_ids", [])]
    states = keys.integers("eagle_aux_hidden_state_layer_ids", states)
    return read(keys, keys, target, states, norm_first=False)


def read_speculators(config: Mapping[str, Any], target: ModelConfig) -> EagleConfig:
    """As vLLM's speculators write it, with the layer in a section. They count the layers before a state."""
    keys = Keys(config)
    states = keys.integers("eagle_aux_hidden_state_layer_ids", [])
    return read(keys, keys.section("transformer_layer_config"), target, states, norm_first=True)
