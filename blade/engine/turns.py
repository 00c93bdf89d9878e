"""Whom to ask a drafter for that takes little time, yet some.

Proposing takes time whether anything is verified of it or not. So a sequence whose drafts were verified lately is asked
for at every step: what is verified pays for that (allocation.MARGIN). The others take turns, as often as a small fixed
share of the time allows. Where proposing is nothing beside a step, that is at every step as well; where it is not,
it takes a few steps until it is noticed that a text has begun to repeat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from blade.types import Sequence

SHARE = 0.005  # of the time, for asking in vain
SAVED = 32  # steps whose share may be saved up for something that takes longer: reading a prompt
STAYS = 8  # asks in vain after which a sequence is one of the others again


class Turns:
    """Who is asked for, of one drafter."""

    def __init__(self) -> None:
        self._seconds = 0.0  # that asking in vain may take now
        self._asks_left: dict[int, int] = {}  # by id of the sequence: of those asked for at every step
        self._turn = 0

    @property
    def go_on(self) -> bool:
        """Some are asked for at every step."""
        return bool(self._asks_left)

    def choose(self, seqs: Seq[Sequence], step: float, since: float, price: Callable[[Sequence], float]) -> set[int]:
        """The ids of those of `seqs` to ask for in the coming step. `step`: seconds that it takes, `since`: with those
        before it for which nobody was chosen; `price`: seconds that asking for one takes."""
        most = SAVED * SHARE * step
        self._seconds = min(self._seconds + SHARE * since, most)
        others = [seq for seq in seqs if not self._goes_on(seq)]
        left_out = self._pay(others, most, price) if others else set[int]()
        return {seq.id for seq in seqs} - left_out

    def paid(self, seq: Sequence) -> None:
        """Something of its draft is verified."""
        self._asks_left[seq.id] = STAYS

    def forget(self, seq: Sequence) -> None:
        self._asks_left.pop(seq.id, None)

    def _goes_on(self, seq: Sequence) -> bool:
        """Whether it is asked for at every step; if so this ask is counted."""
        left = self._asks_left.get(seq.id)
        if left is None:
            return False
        if left == 1:
            del self._asks_left[seq.id]
        else:
            self._asks_left[seq.id] = left - 1
        return True

    def _pay(self, others: list[Sequence], most: float, price: Callable[[Sequence], float]) -> set[int]:
        """Pay for as many of `others` as can be paid for, from the one whose turn it is on; the ids of the rest."""
        first = self._turn % len(others)
        line, left_out = others[first:] + others[:first], set[int]()
        for i, seq in enumerate(line):
            seconds = price(seq)
            if seconds > most:  # never to be saved up
                left_out.add(seq.id)
            elif seconds > self._seconds:
                self._turn += i
                return left_out.union(seq.id for seq in line[i:])
            else:
                self._seconds -= seconds
        return left_out
