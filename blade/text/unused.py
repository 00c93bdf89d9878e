"""Characters to mark places in a text with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blade.errors import RequestError

# Rare ideographs (CJK extension B): no case, no whitespace, unchanged by every Unicode normalisation, and printable, so
# that they survive the repr of a template that prints a dict.
_CANDIDATES = range(0x20000, 0x2A6D7)


def unused_chars(texts: Iterable[str]) -> Iterator[str]:
    """Characters that are in none of the texts; raises RequestError when there is no further one."""
    used = set[str]().union(*texts)
    yield from (char for char in map(chr, _CANDIDATES) if char not in used)
    raise RequestError("The text uses too many different characters.")
