"""What config.json would say of the rotary embedding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from blade.checkpoint.gguf.layouts import HYBRIDS
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from blade.checkpoint.gguf.metadata import Metadata

_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_parameters(metadata: Metadata, head_dim: int, factors: list[float] | None) -> dict[str, Any]:
    """`factors`: by what each of the frequencies is divided, where the file says so."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base", 10000.0)}
    rotary_dim = metadata.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim or metadata.arch in HYBRIDS:  # where config.json would mean a quarter by silence
        rope["partial_rotary_factor"] = rotary_dim / head_dim
    kind = metadata.text("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            metadata.refuse("rope.scaling.type", "none beside a tensor rope_freqs.weight")
        return rope | _llama3(metadata, factors, rope["rope_theta"], head_dim)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        metadata.refuse("rope.scaling.type", "none, linear or yarn")
    rope |= {"rope_type": kind, "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        context = metadata.integer("rope.scaling.original_context_length", metadata.integer("context_length"))
        rope["original_max_position_embeddings"] = context
        for key, source in _YARN.items():
            if metadata.has(f"rope.scaling.{source}"):
                rope[key] = metadata.number(f"rope.scaling.{source}")
    return rope


def _llama3(metadata: Metadata, factors: list[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3.1's rope, or Llama 4's, that give these factors. All released models of one kind share
    all but one: the largest factor, that of the slow frequencies."""
    factor = max(factors)
    if len(factors) != head_dim // 2 or not 1 <= factor < math.inf:
        raise CheckpointError(
            f"{metadata.path}: rope_freqs.weight is not one factor for each pair of {head_dim} channels."
        )
    for high in (_LLAMA3["high_freq_factor"], _LLAMA3["low_freq_factor"]):
        found = {"rope_type": "llama3", "factor": factor, **_LLAMA3, "high_freq_factor": high}
        expected = _llama3_factors(factor, high, theta, len(factors))
        if all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(factors, expected, strict=True)):
            return found
    raise CheckpointError(f"{metadata.path}: rope_freqs.weight is not that of Llama 3, which is all blade knows.")


def _llama3_factors(factor: float, high: float, theta: float, num: int) -> list[float]:
    low, context = _LLAMA3["low_freq_factor"], _LLAMA3["original_max_position_embeddings"]
    turns = [context * theta ** (-i / num) / (2 * math.pi) for i in range(num)]  # of pairs in the original context
    between = max(high - low, 1e-30)  # of Llama 4's there are none
    shares = [min(max((each - low) / between, 0.0), 1.0) for each in turns]
    return [1 / ((1 - share) / factor + share) for share in shares]
