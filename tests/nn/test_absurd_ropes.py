"""Absurd numbers in what config.json says of the rope are refused by their key; those that are taken give a table."""

from __future__ import annotations

from typing import Any

import pytest

from blade import CheckpointError
from blade.nn import DecoderConfig

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2},
    "dynamic": {"factor": 2},
    "llama3": {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64},
    "yarn": {
        "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1,
        "mscale_all_dim": 1, "attention_factor": 1.2,
    },
    "longrope": {
        "factor": 8, "original_max_position_embeddings": 64, "short_factor": [1.5] * 8, "long_factor": [4.0] * 8,
        "attention_factor": 1.1,
    },
}  # fmt: skip
NUMBERS = [1e308, 1e-308, 0, -1, -1e308, float("nan"), float("inf"), 10**400, -(10**400), 2**63]
ABSURD = [*NUMBERS, "8", True, [], {}, [1.0] * 7, *([number] * 8 for number in NUMBERS), ["1"] * 8]
EDGES = [1, 1.0000000000000002, 1e6, 1e-6, 1e15, 1000, 0.001, 2**31 - 1, [1e6] * 8, [1e-6] * 8]


@pytest.mark.parametrize("kind", KINDS)
def test_absurd_values_are_refused_by_name(kind: str) -> None:
    for key in ("rope_theta", *KINDS[kind]):
        for value in ABSURD:
            with pytest.raises(CheckpointError) as caught:
                DecoderConfig.read(MODEL | {"rope_scaling": {"rope_type": kind, **KINDS[kind], key: value}})
            assert f"config.json: rope_scaling.{key} must be " in str(caught.value), value
            assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_gives_a_finite_table(kind: str) -> None:
    """However much it is, and whatever a second key says."""
    taken = 0
    for key in ("rope_theta", *KINDS[kind]):
        for value in EDGES:
            for other in KINDS[kind]:
                for second in (KINDS[kind][other], *EDGES[:4]):
                    rope = {"rope_type": kind, **KINDS[kind], key: value, other: second}
                    taken += gives_a_table(MODEL | {"rope_scaling": rope})
    assert taken > 10 or not KINDS[kind]


def gives_a_table(config: dict[str, Any]) -> bool:
    try:
        found = DecoderConfig.read(config)
    except CheckpointError:
        return False
    assert 1 <= found.max_context < 2**31
    assert bool(found.rope.table(min(found.max_context, 70)).isfinite().all()), config
    return True


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "yarn", "factor": 1e308}, "rope_scaling.factor must be a number from 1 to 1000000, not 1e+308."),
        (
            {"rope_type": "linear", "factor": 1e6, "max_position_embeddings": 2**20},
            "rope_scaling.factor must be at most 2048, beside a context of 1048576 tokens, not 1000000.0.",
        ),
        (
            {"rope_type": "yarn", "original_max_position_embeddings": 2048},
            "original_max_position_embeddings must be at most max_position_embeddings, 512, where there is no factor",
        ),
        (KINDS["yarn"] | {"rope_type": "yarn", "beta_slow": 33}, "beta_fast must be at least beta_slow, 33, not 32."),
        (
            {"rope_type": "llama3", "factor": 0.5, "low_freq_factor": 1, "high_freq_factor": 1},
            "factor must be a number",
        ),
    ],
)
def test_sentences(rope: dict[str, Any], words: str) -> None:
    context = {"max_position_embeddings": rope.get("max_position_embeddings", 512)}
    with pytest.raises(CheckpointError) as caught:
        DecoderConfig.read(MODEL | context | {"rope_scaling": rope})
    assert words in str(caught.value)
