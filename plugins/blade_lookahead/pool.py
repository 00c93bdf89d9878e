"""The n-grams that one sequence has brought so far, by their first token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

MOST_FIRSTS = 8192  # tokens that n-grams begin with; of the one that was not used for longest they are forgotten


class Pool:
    """The latest n-grams of each first token."""

    def __init__(self, most: int) -> None:
        """`most`: n-grams that are kept of each first token."""
        self._most = most
        self._rests: OrderedDict[int, OrderedDict[tuple[int, ...], None]] = OrderedDict()

    def add(self, ngram: Seq[int]) -> None:
        first, rest = ngram[0], tuple(ngram[1:])
        rests = self._rests.setdefault(first, OrderedDict())
        self._rests.move_to_end(first)
        rests[rest] = None
        rests.move_to_end(rest)
        if len(rests) > self._most:
            rests.popitem(last=False)
        if len(self._rests) > MOST_FIRSTS:
            self._rests.popitem(last=False)

    def after(self, first: int) -> list[tuple[int, ...]]:
        """What follows `first` in its n-grams, the latest first."""
        return list(reversed(self._rests.get(first, {})))
