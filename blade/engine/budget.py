"""What speculation may lose: no more than it has won lately and a small share of the time."""

from __future__ import annotations

from collections import OrderedDict

SHARE = 0.005  # of the time, that may be lost
SAVED = 8  # steps whose time may be saved up: that may be lost before anything is won again
FIRST = 2  # steps of a shape that take longer: they compile or capture
MOST_SHAPES = 48  # in use at a time; devices keep some more (contracts.Ops.capture)
LEARN = 0.2


class Budget:
    """Seconds there are to lose. What is won adds to it, by the costs that are known (costs.py), what is spent takes
    from it."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    @property
    def seconds(self) -> float:
        return self._seconds or 0.0

    def open(self, step: float) -> None:
        """A step of so many seconds is to come."""
        most = SAVED * step
        self._seconds = most if self._seconds is None else min(self._seconds + SHARE * step, most)

    def win(self, seconds: float) -> None:
        self._seconds = self.seconds + seconds

    def spend(self, seconds: float) -> None:
        self._seconds = self.seconds - seconds


class Shapes:
    """The shapes that steps have had lately, (sequences, tokens), and what a new one costs: the device captures it
    (contracts.Ops.capture), which may take longer than several steps. Only what is used again repays that."""

    def __init__(self) -> None:
        self._num_steps: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.price: float | None = None  # seconds more that the first steps take, each

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
