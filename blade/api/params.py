"""The one validator of sampling fields, for every front end: what passes here the engine trusts."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import msgspec

from blade.errors import RequestError
from blade.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from blade.api.wire import Sampling
    from blade.contracts import LogitsProcessor, Tokenizer
    from blade.types import Limits

    ProcessorFactories = Mapping[str, Callable[[Any, Tokenizer], LogitsProcessor]]

log = logging.getLogger("blade.api")

RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
BIAS_RANGE = (-100, 100)
MAX_TOP_LOGPROBS = 20
MAX_STOP_CHARS = 8192
MAX_REPLY_LOGPROBS = 1 << 23  # a context of 2**18 tokens with the 20 most likely of each is within; some 800 MB are not
ONLY_THE_TOP = 1e-9  # top_p: 0 asks for the most likely token alone; below 1 / vocab_size that is what any top_p gives


def sampling_params(
    request: Sampling, limits: Limits, eos_ids: Collection[int], num_logprobs: int | None
) -> SamplingParams:
    """The parameters of a request but for max_tokens, seed and processors, which differ by prompt and choice.

    Raises RequestError naming the field: not finite, out of range, or an id that the logits do not have.
    """
    for name, (low, high) in RANGES.items():
        _check_within(name, getattr(request, name), low, high)
    stop_ids = [*_checked_ids(request, "stop_tokens", limits), *_checked_ids(request, "stop_token_ids", limits)]
    if request.min_tokens and len(set(stop_ids)) >= limits.vocab_size:
        raise RequestError("every token is a stop token, so min_tokens cannot be reached.", param="min_tokens")
    return SamplingParams(
        max_tokens=1,
        min_tokens=request.min_tokens or 0,
        temperature=_given(request.temperature, 1.0),
        top_p=_given(request.top_p, 1.0) or ONLY_THE_TOP,
        top_k=_top_k(request.top_k, limits.vocab_size),
        min_p=_given(request.min_p, 0.0),
        repetition_penalty=_repetition_penalty(request.repetition_penalty),
        presence_penalty=_given(request.presence_penalty, 0.0),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request.logit_bias or {}, limits.vocab_size),
        stop_token_ids=tuple(dict.fromkeys([*stop_ids, *(() if request.ignore_eos else eos_ids)])),
        logprobs=num_logprobs,
    )


def resolve_max_tokens(
    request: Sampling, num_prompt: int, default: int | None, limits: Limits, prompt_field: str
) -> int:
    """Output tokens for a prompt of `num_prompt`: what was asked for, else `default`, else to the end of the context.
    Never less: raises RequestError when they do not fit."""
    field, asked = "max_tokens", request.max_tokens
    if request.max_completion_tokens is not None:
        if asked is not None and asked != request.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens contradict each other.", param="max_tokens")
        field, asked = "max_completion_tokens", request.max_completion_tokens
    room = limits.max_context - num_prompt
    num_tokens = asked or default or room
    if num_tokens > room or room < 1:
        raise RequestError(
            f"{prompt_field} has {num_prompt} tokens, which leaves room for {max(room, 0)} in the context of "
            f"{limits.max_context}; {field} is {num_tokens if asked or default else 'not set'}.",
            param=field if asked and room > 0 else prompt_field,
            remedy="Shorten one of them.",
        )
    if (request.min_tokens or 0) > num_tokens:
        raise RequestError(f"min_tokens is {request.min_tokens}, more than {field}, {num_tokens}.", param="min_tokens")
    return num_tokens


def completion_logprobs(request: Sampling) -> int | None:
    """`logprobs` of /v1/completions: a count as in OpenAI's, or a flag (with `top_logprobs`) as in BladeLLM's."""
    if isinstance(request.logprobs, bool) or request.logprobs is None:
        return chat_logprobs(request)
    return _checked_count("logprobs", request.logprobs)


def chat_logprobs(request: Sampling) -> int | None:
    """`logprobs` of /v1/chat/completions: a flag, with `top_logprobs`; a count above 0 means both at once."""
    top = None if request.top_logprobs is None else _checked_count("top_logprobs", request.top_logprobs)
    if not request.logprobs:
        if top:
            raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        return None
    count = 0 if request.logprobs is True else _checked_count("logprobs", request.logprobs)
    return count if top is None else top


def check_num_logprobs(request: Sampling, num_prompts: int, num_logprobs: int | None) -> None:
    """Raises RequestError for more log-probabilities than any reply can hold. What no max_tokens was given for may end
    at any token: only its reply tells (blade.api.replies)."""
    max_tokens = request.max_completion_tokens or request.max_tokens
    if num_logprobs is None or max_tokens is None:
        return
    num_choices, per_token = num_prompts * (request.n or 1), 1 + num_logprobs
    if num_choices * max_tokens * per_token > MAX_REPLY_LOGPROBS:
        raise RequestError(
            f"n, max_tokens and logprobs ask for {num_choices} choices of {max_tokens} tokens with {per_token} "
            f"log-probabilities each, more than {MAX_REPLY_LOGPROBS} in all.",
            "logprobs",
            "Ask for less of one of them.",
        )


def stop_strings(request: Sampling) -> list[str]:
    given = [request.stop, request.stop_sequences]
    texts = [text for stop in given if stop is not None for text in ([stop] if isinstance(stop, str) else stop)]
    if (num_chars := sum(map(len, texts))) > MAX_STOP_CHARS:
        raise RequestError(
            f"the stop strings have {num_chars} characters together, more than {MAX_STOP_CHARS}.", param="stop"
        )
    return texts


def check_processors(request: Sampling, factories: ProcessorFactories) -> None:
    for name in request.logits_processors or {}:
        if name not in factories:
            known = ", ".join(sorted(factories)) or "none"
            raise RequestError(
                f"logits_processors: there is no {name[:64]!r}.", "logits_processors", f"There are: {known}."
            )


def make_processors(
    request: Sampling, factories: ProcessorFactories, tokenizer: Tokenizer
) -> tuple[LogitsProcessor, ...]:
    """One new object per processor asked for: they may keep state, so every choice gets its own."""
    made = []
    for name, arguments in (request.logits_processors or {}).items():
        try:
            made.append(factories[name](arguments, tokenizer))
        except RequestError:
            raise
        except Exception:  # a plugin's own code, choking on what the request brought
            log.exception("logits processor %r failed", name)
            field = f"logits_processors.{name}"
            raise RequestError(f"{field}: the arguments are not valid.", field) from None
    return tuple(made)


def check_ids(ids: list[int], param: str, limits: Limits) -> None:
    """Raises RequestError unless all ids are ones the logits have."""
    if ids and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
        raise RequestError(f"{param} holds ids outside [0, {limits.vocab_size}).", param=param)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} has to be in [{low:g}, {high:g}], got {value:g}.", param=name)


def _repetition_penalty(value: float | None) -> float:
    if value is not None and not (math.isfinite(value) and 0.01 <= value <= 100):
        raise RequestError(
            f"repetition_penalty has to be a strictly positive float, from 0.01 to 100, got {value:g}.",
            param="repetition_penalty",
        )
    return _given(value, 1.0)


def _top_k(value: int | None, vocab_size: int) -> int:
    """0 for off; -1 says the same, and so does the whole vocabulary."""
    return value if value is not None and 0 < value < vocab_size else 0


def _logit_bias(bias: dict[int, float], vocab_size: int) -> dict[int, float]:
    for token_id, value in bias.items():
        if token_id >= vocab_size:
            raise RequestError(f"logit_bias: {token_id} is outside [0, {vocab_size}).", param="logit_bias")
        _check_within("logit_bias", value, *BIAS_RANGE)
    return bias


def _checked_ids(request: Sampling, field: str, limits: Limits) -> list[int]:
    ids: list[int] = getattr(request, field) or []
    check_ids(ids, field, limits)
    return ids


def _checked_count(name: str, value: int) -> int:
    if not 0 <= value <= MAX_TOP_LOGPROBS:
        raise RequestError(f"{name} has to be in [0, {MAX_TOP_LOGPROBS}], got {value}.", param=name)
    return value


def for_choice(
    params: SamplingParams, max_tokens: int, index: int, seed: int | None, processors: tuple[Any, ...]
) -> SamplingParams:
    """`params` for choice `index` of its prompt: with one seed, each choice still has its own, reproducible, stream."""
    own_seed = None if seed is None else (seed + index) & (2**64 - 1)
    return msgspec.structs.replace(params, max_tokens=max_tokens, seed=own_seed, processors=processors)
