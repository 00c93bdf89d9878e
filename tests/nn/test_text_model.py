"""The text model of a checkpoint that sees or hears as well is found by its section and by its names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blade import CheckpointError
from blade.checked import text_section
from blade.nn import DecoderConfig, Keys, Loader, located, text_model
from blade.testing import TensorWeights
from blade_native.reference import TorchOps

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    "max_position_embeddings": 512,
}  # fmt: skip
NAMED = {"architectures": ["X"]}
PLACES = {"model.language_model": "lm_head", "thinker.model": "thinker.lm_head"}


@pytest.mark.parametrize(
    "whole",
    [
        NAMED | TEXT,
        NAMED | {"text_config": TEXT},
        NAMED | {"thinker_config": {"text_config": TEXT}},
        NAMED | TEXT | {"hidden_size": 8, "text_config": TEXT},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_its_keys_may_be_in_a_section(whole: dict[str, Any], tied: bool) -> None:
    keys, fields = text_model(Keys(whole | {"tie_word_embeddings": tied}))
    config = DecoderConfig.read(keys, **fields)
    assert (config.architecture, config.hidden_size, config.tied) == ("X", 64, tied)
    assert text_section(whole).items() >= TEXT.items()


def test_the_embedding_may_be_said_to_be_the_head_in_the_section_alone() -> None:
    _, fields = text_model(Keys(NAMED | {"text_config": TEXT | {"tie_word_embeddings": True}}))
    assert fields["tied"] is True


def test_a_wrong_key_is_named_with_its_section() -> None:
    keys, fields = text_model(Keys(NAMED | {"thinker_config": {"text_config": TEXT | {"vocab_size": "100"}}}))
    with pytest.raises(CheckpointError, match=r"thinker_config\.text_config\.vocab_size must be an integer"):
        DecoderConfig.read(keys, **fields)


@pytest.mark.parametrize(("prefix", "head"), [*PLACES.items(), ("model", "lm_head")])
def test_its_tensors_may_have_longer_names(prefix: str, head: str) -> None:
    weights: Any = TensorWeights({f"{prefix}.norm.weight": torch.ones(64)})
    loader = Loader(weights, TorchOps(), None, torch.float32)  # type: ignore[arg-type]
    found = located(DecoderConfig.read(NAMED | TEXT), loader, PLACES)
    assert (found.prefix, found.head) == (prefix, head)
