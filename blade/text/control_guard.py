"""Keeps what a request says from becoming control tokens once a chat template has put it among its own.

Whatever in a request's strings is a control token, or could be completed to one by the text beside it, is replaced by
a character nobody uses before rendering; `Tokenizer.encode_template` puts it back as plain text after it has found the
template's control tokens. Strings without such a thing, nearly all, stay as they are, and so does their tokenisation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from blade.text.unused import unused_chars

Span = tuple[int, int]


class ControlGuard:
    """Made once for a set of control tokens."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        self._tokens = sorted(control_tokens, key=len, reverse=True)
        self._reach = len(self._tokens[0]) - 1 if self._tokens else 0  # of a proper part of a token
        self._pattern = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._starts = {token[:n] for token in self._tokens for n in range(1, len(token))}
        self._ends = {token[n:] for token in self._tokens for n in range(1, len(token))}
        self._unbracketed = {token[1:-1] for token in self._tokens}

    def protect(self, value: Any, avoid: str = "") -> tuple[Any, dict[str, str]]:
        """(the value with stand-ins in its strings, {stand-in: what it stands for}); the value itself and {} when
        nothing in it needs one. Strings are looked for in lists and dicts, keys too. `avoid` is text whose characters
        are no stand-ins."""
        texts = set(_strings(value))
        spans = {text: found for text in texts if (found := self._find(text))}
        if not spans:
            return value, {}
        chars = unused_chars([avoid, *texts])
        parts = {text[start:stop] for text, found in spans.items() for start, stop in found}
        stand_ins = {part: next(chars) for part in sorted(parts)}
        guarded = {text: _replace(text, found, stand_ins) for text, found in spans.items()}
        return _map_strings(value, lambda text: guarded.get(text, text)), {char: p for p, char in stand_ins.items()}

    def _find(self, text: str) -> list[Span]:
        """What to replace, in order, without overlaps."""
        if 0 < len(text) <= self._reach and self._is_inside(text):
            return [(0, len(text))]
        spans = [match.span() for match in self._pattern.finditer(text)]
        lengths = range(min(self._reach, len(text)), 0, -1)
        spans += [(0, n) for n in lengths if text[:n] in self._ends][:1]
        spans += [(len(text) - n, len(text)) for n in lengths if text[-n:] in self._starts][:1]
        return _merge(spans) if spans else []

    def _is_inside(self, text: str) -> bool:
        """Whether brackets around it could make it a control token. Plain words inside of one ("end") are left
        alone, since templates compare strings with such."""
        if text in self._unbracketed:
            return True
        return re.search(r"\W", text) is not None and any(text in token for token in self._tokens)


def _merge(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _replace(text: str, spans: list[Span], stand_ins: dict[str, str]) -> str:
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [text[end:start], stand_ins[text[start:stop]]]
        end = stop
    return "".join(pieces) + text[end:]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
