"""Whose hidden states a drafter is shown: reading them takes time, whether anything comes of it or not.

It may take what the drafter's own drafts win, and a small share of the time besides. While there is nothing left of
that, sequences that begin are left out. One that a draft is asked for is shown from there on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.types import Sequence

SHARE = 0.005  # of the time, for reading that nothing comes of
GIVEN, SAVED = 8, 64  # steps whose time may be spent before anything is won; that may be saved up


class Reading:
    """Of one drafter. Without `limit` there is no bound."""

    def __init__(self) -> None:
        self._seconds = math.inf  # there are to spend; below 0: what was read took longer than there was
        self._is_shown: dict[int, bool] = {}  # by id of the sequence

    def limit(self, step: float) -> None:
        """From now on. `step`: seconds of one without drafts."""
        self._seconds = GIVEN * step

    def gain(self, step: float, passed: float = 0.0, won: float = 0.0) -> None:
        """Seconds have passed, or were won by drafts."""
        self._seconds = min(self._seconds + SHARE * passed + won, max(self._seconds, SAVED * step))

    def spend(self, seconds: float) -> None:
        self._seconds -= seconds

    def ask(self, seqs: Seq[Sequence]) -> None:
        """A draft is asked for."""
        self._is_shown.update((seq.id, True) for seq in seqs)

    def chosen(self, seqs: Seq[Sequence]) -> list[int]:
        """The places of those of `seqs` that are shown."""
        return [i for i, seq in enumerate(seqs) if self._is_shown.setdefault(seq.id, self._seconds > 0)]

    def forget(self, seq: Sequence) -> None:
        self._is_shown.pop(seq.id, None)
