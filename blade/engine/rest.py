"""When to think about drafts at all: thinking takes time as well, on short steps more than what it is about."""

from __future__ import annotations

SHARE = 0.005  # of the time, for thoughts that nothing comes of
MOST = 16  # steps of a rest


class Rest:
    """Steps that are left alone after a thought that nothing came of, as long as it took in relation to SHARE."""

    def __init__(self) -> None:
        self._owed = 0.0  # seconds of thoughts
        self._since = 0.0  # seconds of the steps that were left alone

    def goes_on(self, step: float) -> bool:
        """A step of so many seconds is to come; whether it is left alone."""
        self._owed = min(self._owed, MOST * SHARE * step) - SHARE * step
        self._since += step
        return self._owed > 0

    def end(self) -> float:
        """The coming step is thought about; gives the seconds of it and of all that were left alone before it."""
        since, self._since = self._since, 0.0
        return since

    def begin(self, seconds: float) -> None:
        """A thought has taken so long."""
        self._owed = max(0.0, self._owed) + seconds
