"""Log-probabilities in the three shapes clients know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.contracts import Tokenizer
    from blade.types import Sampled, TokenLogprob

LOWEST = -9999.0  # stands for log 0, which JSON cannot say


class TopToken(Struct):
    token: str
    logprob: float
    bytes: list[int]


class Token(TopToken):
    top_logprobs: list[TopToken]


class BladeTopToken(TopToken):
    id: int
    is_special: bool = False


class BladeToken(BladeTopToken, kw_only=True):
    top_logprobs: list[BladeTopToken]


class LegacyLogprobs(Struct):
    """OpenAI's of /v1/completions: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


def tokens(sampled: Seq[Sampled], tokenizer: Tokenizer) -> list[Token]:
    out = []
    for s in sampled:
        text, raw = _text(s.token_id, tokenizer)
        top = [TopToken(*_shown(t, tokenizer)) for t in s.top]
        out.append(Token(token=text, logprob=_finite(s.logprob), bytes=raw, top_logprobs=top))
    return out


def blade_tokens(sampled: Seq[Sampled], tokenizer: Tokenizer) -> list[BladeToken]:
    out = []
    for s in sampled:
        text, raw = _text(s.token_id, tokenizer)
        top = [BladeTopToken(*_shown(t, tokenizer), t.token_id, _is_special(t.token_id, tokenizer)) for t in s.top]
        special = _is_special(s.token_id, tokenizer)
        out.append(
            BladeToken(
                token=text, logprob=_finite(s.logprob), bytes=raw, id=s.token_id, is_special=special, top_logprobs=top
            )
        )
    return out


def legacy(sampled: Seq[Sampled], tokenizer: Tokenizer, offset: int) -> LegacyLogprobs:
    """`offset` is the number of characters before the first of these tokens."""
    texts = [_text(s.token_id, tokenizer)[0] for s in sampled]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = [{_text(t.token_id, tokenizer)[0]: _finite(t.logprob) for t in s.top} for s in sampled]
    return LegacyLogprobs(texts, [_finite(s.logprob) for s in sampled], top if any(top) else None, offsets)


def _shown(token: TokenLogprob, tokenizer: Tokenizer) -> tuple[str, float, list[int]]:
    text, raw = _text(token.token_id, tokenizer)
    return text, _finite(token.logprob), raw


def _text(token_id: int, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    raw = tokenizer.token_bytes(token_id)
    return raw.decode("utf-8", "replace"), list(raw)


def _is_special(token_id: int, tokenizer: Tokenizer) -> bool:
    """Ids without text are the control tokens."""
    return not tokenizer.token_bytes(token_id)


def _finite(logprob: float | None) -> float:
    return LOWEST if logprob is None else max(logprob, LOWEST)
