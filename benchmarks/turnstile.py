"""Lets several engines of one process run in turns of a fraction of a second, each with a clock of its own.

A machine whose speed changes from second to second then changes it for all of them alike, and what is compared is their
own doing.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blade.engine.engine import Engine

TURN = 0.3  # seconds


class Turnstile:
    """One engine at a time is let through: the others wait before their next step."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: list[Clock] = []  # those that have work; the first one is let through

    def enter(self, clock: Clock) -> None:
        with self._changed:
            self._line.append(clock)
            if len(self._line) == 1:
                clock.start()
            self._changed.notify_all()

    def leave(self, clock: Clock) -> None:
        """It has no more work."""
        with self._changed:
            if self._line[0] is clock:
                clock.stop()
            self._line.remove(clock)
            self._let_through()

    def wait(self, clock: Clock) -> None:
        """Until it may take a step."""
        with self._changed:
            if clock in self._line and self._line[0] is clock and clock.turn > TURN:
                clock.stop()
                self._line.append(self._line.pop(0))
                self._let_through()
            self._changed.wait_for(lambda: clock not in self._line or self._line[0] is clock)

    def _let_through(self) -> None:
        if self._line:
            self._line[0].start()
        self._changed.notify_all()


class Clock:
    """The time that an engine was let through."""

    def __init__(self, engine: Engine, turnstile: Turnstile) -> None:
        self._turnstile = turnstile
        self._before = 0.0  # in earlier turns
        self._started: float | None = None
        take_step: Any = engine._step

        def step() -> Any:
            turnstile.wait(self)
            return take_step()

        engine._step = step  # type: ignore[method-assign]

    @property
    def turn(self) -> float:
        """Seconds of this turn."""
        started = self._started
        return 0.0 if started is None else time.perf_counter() - started

    def __call__(self) -> float:
        return self._before + self.turn

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        self._before, self._started = self(), None

    def __enter__(self) -> None:
        self._turnstile.enter(self)

    def __exit__(self, *_: object) -> None:
        self._turnstile.leave(self)
