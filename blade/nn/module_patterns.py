"""Regular expressions of a checkpoint's settings, matched against modules' names without trusting whoever wrote them.

Python's `re` goes back and tries again, and a pattern can be made so that it tries for ever. So a pattern is weighed
before it is used, by the number of ways in which it may be tried: a repeated character counts for many, a choice for
as many as it offers, and what follows each other multiplies. A repeated group, whose ways have no such bound, is
refused. What is left has a budget of processor time.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Value = TypeVar("Value")
MOST_WAYS = 2**22
WAYS_OF_REPEAT = 2**5  # of one among several: 4 of them end in C(length, 4) ways
MOST_CHARACTERS = 1000  # of a pattern
MOST_OF_NAME = 200  # characters of a module's name that a pattern is tried on
SECONDS = 2.0  # of processor time, for all names of a checkpoint; an ordinary match takes a microsecond
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|[*+?]|\{\d*,?\d*\}|.", re.DOTALL)
_HIDING = re.compile(r"\(\?(#|[a-zA-Z-]*x)")  # comments, which may hide anything from _TOKEN


class ModulePatterns(Generic[Value]):
    """What patterns say of the modules that they match; the first that does counts."""

    def __init__(self, method: str = "match") -> None:
        """`method` of the compiled patterns: "match", "fullmatch" or "search"."""
        self._method, self._spent = method, 0.0
        self._patterns: list[tuple[str, Callable[[str], object], Value]] = []

    def __len__(self) -> int:
        return len(self._patterns)

    def add(self, path: str, pattern: str, value: Value) -> None:
        """`path`: where in config.json it is. Raises CheckpointError for what is no regular expression, and for what
        could take too long."""
        if len(pattern) > MOST_CHARACTERS or _HIDING.search(pattern):
            raise _refused(path, pattern, "is too long, or has comments")
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise _refused(path, pattern, f"is no regular expression: {error}") from None
        if _ways(iter(_TOKEN.findall(pattern))) > MOST_WAYS:
            raise _refused(path, pattern, "could take too long to match: it has repeated groups, or many repeats")
        self._patterns.append((path, getattr(compiled, self._method), value))

    def find(self, *names: str) -> Value | None:
        """Of the first pattern that one of the names matches; None where none does."""
        names = tuple(name for name in names if len(name) <= MOST_OF_NAME)
        for path, matches, value in self._patterns:
            started = time.thread_time()
            found = any(matches(name) for name in names)
            self._spent += time.thread_time() - started
            if self._spent > SECONDS:
                raise CheckpointError(f"config.json: {path}: the patterns take too long to match.")
            if found:
                return value
        return None


def _ways(pieces: Iterator[str]) -> float:
    """In which what comes up to the end of the group may be tried; infinitely many where a group is repeated."""
    others, sequence, after_group = 0.0, 1.0, False
    for piece in pieces:
        if piece == ")":
            break
        if piece == "|":
            others, sequence = others + sequence, 1.0
        elif piece == "?":
            sequence *= 2
        elif piece in ("*", "+") or (piece[0] == "{" and len(piece) > 1):
            sequence *= float("inf") if after_group else WAYS_OF_REPEAT
        elif piece == "(":
            sequence *= _ways(pieces)
        after_group = piece == "("
    return others + sequence


def _refused(path: str, pattern: str, reason: str) -> CheckpointError:
    return CheckpointError(f"config.json: {path}: {pattern!r:.60} {reason}.")
