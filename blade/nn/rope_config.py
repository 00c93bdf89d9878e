"""config.json's words on the rotary embedding: `rope_parameters`, or as before transformers 5 `rope_scaling`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from blade.checked import MAX_INTEGER
from blade.nn.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope

if TYPE_CHECKING:
    from blade.nn.keys import Keys

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "mrope")
ORIGINAL = "original_max_position_embeddings"
# Far beyond what any model has, and far within what float32 and the arithmetic of ropes can bear
MAX_THETA = 1e15
MAX_FACTOR = 1e6
MAGNITUDES = (1e-3, 1e3)
TURNS = (1e-6, 1e6)


def read_rope(config: Keys, head_dim: int) -> Rope:
    """Raises CheckpointError naming the key that is wrong, and for an unknown kind those that are known."""
    section = "rope_scaling" if config.has("rope_scaling") else "rope_parameters"
    keys = config.section(section)
    if keys.has("full_attention") or keys.has("sliding_attention"):
        config.refuse(section, "one rope for all layers")
    kind = keys.text("rope_type", keys.text("type", "default"))
    if kind not in KINDS:
        keys.refuse("rope_type" if keys.has("rope_type") else "type", f"one of {', '.join(KINDS)}")
    plain = (_theta(config, keys), _rotary_dim(config, keys, head_dim), config.integer("max_position_embeddings"))
    match kind:
        case "linear":
            return LinearRope(*plain, _stretch(keys, plain[2]))
        case "dynamic":
            return DynamicRope(*plain, _stretch(keys, plain[2]))
        case "llama3":
            return _llama3(config, keys, plain)
        case "yarn":
            return _yarn(config, keys, plain)
        case "longrope":
            return _longrope(config, keys, plain)
    return Rope(*plain)  # "mrope" too: of its several axes text has the same position on all


def _theta(config: Keys, keys: Keys) -> float:
    where = keys if keys.has("rope_theta") else config
    theta = where.number("rope_theta", 10000.0)
    if not 1 < theta <= MAX_THETA:
        where.refuse("rope_theta", f"above 1 and at most {MAX_THETA:g}")
    return theta


def _factor(keys: Keys, default: float | None = None) -> float:
    return keys.number("factor", default, 1.0, MAX_FACTOR)


def _stretch(keys: Keys, context: int, default: float | None = None) -> float:
    """The factor of a rope that makes so many tokens more."""
    factor = _factor(keys, default)
    if context * factor > MAX_INTEGER:
        keys.refuse("factor", f"at most {MAX_INTEGER / context:g}, beside a context of {context} tokens")
    return factor


def _rotary_dim(config: Keys, keys: Keys, head_dim: int) -> int:
    share = keys.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * min(share, 2.0))  # above 1 it is refused, however large
    if rotary_dim % 2 or not 2 < rotary_dim <= head_dim:
        where = keys if keys.has("partial_rotary_factor") else config
        where.refuse("partial_rotary_factor", f"a share of the head's {head_dim} channels that makes pairs of them")
    return rotary_dim


def _original_context(config: Keys, keys: Keys, trained_context: int) -> int:
    return config.integer(ORIGINAL, keys.integer(ORIGINAL, trained_context))


def _llama3(config: Keys, keys: Keys, plain: tuple[float, int, int]) -> Rope:
    low, high = keys.number("low_freq_factor", None, *TURNS), keys.number("high_freq_factor", None, *TURNS)
    if high < low:
        keys.refuse("high_freq_factor", f"at least low_freq_factor, {low:g}")
    return Llama3Rope(*plain, _factor(keys), low, high, _original_context(config, keys, plain[2]))


def _yarn(config: Keys, keys: Keys, plain: tuple[float, int, int]) -> Rope:
    original_context = _original_context(config, keys, plain[2])
    if original_context > plain[2] and not keys.has("factor"):
        where = config if config.has(ORIGINAL) else keys
        where.refuse(ORIGINAL, f"at most max_position_embeddings, {plain[2]}, where there is no factor")
    factor = _stretch(keys, original_context, plain[2] / original_context)
    magnitude = _yarn_magnitude(factor, 1.0)
    if keys.has("mscale") and keys.has("mscale_all_dim"):
        magnitude = _yarn_magnitude(factor, keys.number("mscale", None, *MAGNITUDES))
        magnitude /= _yarn_magnitude(factor, keys.number("mscale_all_dim", None, *MAGNITUDES))
    fast, slow = keys.number("beta_fast", 32.0, *TURNS), keys.number("beta_slow", 1.0, *TURNS)
    if fast < slow:
        keys.refuse("beta_fast", f"at least beta_slow, {slow:g}")
    return YarnRope(
        *plain,
        factor,
        original_context,
        beta_fast=fast,
        beta_slow=slow,
        truncate=keys.flag("truncate", True),
        magnitude=keys.number("attention_factor", magnitude, *MAGNITUDES),
    )


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1.0


def _longrope(config: Keys, keys: Keys, plain: tuple[float, int, int]) -> Rope:
    original_context = _original_context(config, keys, plain[2])
    for key in ("short_mscale", "long_mscale"):
        if keys.has(key):
            keys.refuse(key, "absent: blade serves one magnitude for all contexts")
    factor, magnitude = _factor(keys, max(1.0, plain[2] / original_context)), 1.0
    if factor > 1 and original_context > 1:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original_context))
    return LongRope(
        *plain,
        original_context,
        _pairs(keys, "short_factor", plain[1]),
        _pairs(keys, "long_factor", plain[1]),
        magnitude=keys.number("attention_factor", magnitude, *MAGNITUDES),
    )


def _pairs(keys: Keys, key: str, rotary_dim: int) -> tuple[float, ...]:
    factors = keys.numbers(key, 1 / MAX_FACTOR, MAX_FACTOR)
    if len(factors) != rotary_dim // 2:
        keys.refuse(key, f"a number for each of {rotary_dim // 2} pairs of channels")
    return tuple(factors)
