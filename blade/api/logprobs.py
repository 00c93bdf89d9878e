"""Log-probabilities in the three shapes clients know."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.contracts import Tokenizer
    from blade.types import Sampled, TokenLogprob

LOWEST = -9999.0  # stands for log 0, which JSON cannot say

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


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


class Offsets:
    """Where tokens begin in the text that blade.text.detokenizer makes of them, in characters. A token within a
    character has that character's place."""

    def __init__(self) -> None:
        self._utf8 = _Utf8Decoder(errors="replace")
        self._num_chars = 0  # that are complete

    def push(self, data: bytes) -> int:
        """The place of the next token, whose bytes these are."""
        completed = len(self._utf8.decode(data[:1]))
        # A byte may end a character that never becomes one and begin another.
        is_pending = bool(self._utf8.getstate()[0])
        offset = self._num_chars + (completed if is_pending else max(completed - 1, 0))
        self._num_chars += completed + len(self._utf8.decode(data[1:]))
        return offset


def legacy(sampled: Seq[Sampled], tokenizer: Tokenizer, offsets: Offsets) -> LegacyLogprobs:
    """`offsets` has been given the tokens before these."""
    return LegacyLogprobs(
        [_spelt(s.token_id, tokenizer) for s in sampled],
        [_finite(s.logprob) for s in sampled],
        [_legacy_top(s.top, tokenizer) for s in sampled] if any(s.top for s in sampled) else None,
        [offsets.push(tokenizer.token_bytes(s.token_id)) for s in sampled],
    )


def _legacy_top(top: Seq[TokenLogprob], tokenizer: Tokenizer) -> dict[str, float]:
    """Of tokens that are spelt alike, as control tokens are, the most likely one, which comes first."""
    out: dict[str, float] = {}
    for token in top:
        out.setdefault(_spelt(token.token_id, tokenizer), _finite(token.logprob))
    return out


def _spelt(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text; OpenAI's `bytes:\\xe2\\x80` where it holds a part of a character only."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


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
