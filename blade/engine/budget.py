"""What speculation may lose: no more than it has won lately and a small share of the time.

Chances and costs are estimates. Should they be wrong, then so are the decisions that follow from them; what it costs is
bounded here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SHARE = 0.005  # of the time, that may be lost
SAVED, OWED, GIVEN = 4, 1, 1  # steps whose time may be saved up; that may be owed; lost before anything is won
FIRST = 2  # steps of a shape that take longer: they compile or capture
MOST_SHAPES = 48  # in use at a time; devices keep some more (contracts.Ops.capture)
LEARN = 0.2


class Budget:
    """Seconds there are to lose. What is won adds to it, by the costs that are known (costs.py), what is spent takes
    from it."""

    def __init__(self) -> None:
        self.seconds = 0.0  # below 0: what was lost was more than expected
        self._step: float | None = None  # seconds of the step that was opened last

    def open(self, step: float, since: float, new_shape: float) -> None:
        """A step of so many seconds is to come. `since`: seconds of it and of those before it that this was not told
        of; `new_shape`: seconds that the first steps of a shape take longer."""
        if self._step is None:
            self.seconds = GIVEN * step
        self._step = step
        self.seconds = min(self.seconds + SHARE * since, SAVED * step + FIRST * new_shape)

    def win(self, seconds: float) -> None:
        self.seconds += seconds

    def spend(self, seconds: float) -> None:
        self.seconds = max(-OWED * (self._step or 0.0), self.seconds - seconds)


class Shapes:
    """The shapes that steps have had lately, (sequences, tokens), and what a new one costs: the device captures it
    (contracts.Ops.capture), which may take longer than several steps. Only what is used again repays that."""

    def __init__(self, known: Iterable[tuple[int, int]] = (), price: float | None = None) -> None:
        self._num_steps: OrderedDict[tuple[int, int], int] = OrderedDict.fromkeys(known, FIRST)
        self.price = price  # seconds more that the first steps take, each; None: nobody knows yet

    def is_new(self, num_seqs: int, num_tokens: int) -> bool:
        return self._num_steps.get((num_seqs, num_tokens), 0) < FIRST

    def add(self, num_seqs: int, num_tokens: int) -> None:
        """There is a step of that shape."""
        shape = num_seqs, num_tokens
        self._num_steps[shape] = self._num_steps.get(shape, 0) + 1
        self._num_steps.move_to_end(shape)
        if len(self._num_steps) > MOST_SHAPES:
            self._num_steps.popitem(last=False)

    def learn(self, seconds: float) -> None:
        """A step of a new shape took so much longer than others of its size."""
        self.price = max(0.0, seconds if self.price is None else self.price + LEARN * (seconds - self.price))
