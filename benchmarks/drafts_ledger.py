"""What speculation won and what it took, from the steps of one engine alone.

Two engines that do the very same differ by some percent on many machines: their memory lies elsewhere. Here steps with
drafts are compared with those without of the same engine and run, by the number of their sequences. What drafters do
within a step, reading hidden states or what was sampled along trees, is drafting and no part of the step.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blade.engine.engine import Engine

STALL = 3  # times as long as usual: the machine's doing, and not to be won by drafts
ENOUGH = 8  # steps of a size, to know their average


class Ledger:
    """Of one engine with drafts, from `start_anew` on. Steps with chunks of prompts have won nothing, and lost what
    drafters did in them alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._speculator: Any = engine.speculator
        self._num_seqs = 0  # of the step that was run last; 0: it had prompts as well
        self.start_anew()
        if self._speculator is not None:
            for name in ("draft", "stepped", "verified"):
                self._watch(name, getattr(self, f"_{name}"))

    def start_anew(self) -> None:
        self._plain: dict[int, list[float]] = defaultdict(list)  # by number of sequences: seconds of steps
        self._drafted: dict[int, list[float]] = defaultdict(list)
        self._accepted: dict[int, int] = defaultdict(int)
        self._outside = self._within = 0.0  # seconds of drafting outside steps, and of drafters within them
        self._drafters = self._seconds()
        self._before = self._engine.stats().step_seconds

    def speedup(self) -> float:
        """The time that the same would have taken without drafts by the time that it took."""
        took = self._engine.stats().step_seconds - self._before + self._outside
        plain = self._without(set(self._drafted) | set(self._accepted))
        won = sum(num * plain[seqs] / seqs for seqs, num in self._accepted.items() if seqs in plain)
        lost = sum(sum(all_) - len(all_) * plain[seqs] for seqs, all_ in self._drafted.items() if seqs in plain)
        return (took + won - lost - self._outside - self._within) / took if took else 1.0

    def _without(self, nums: set[int]) -> dict[int, float]:
        """What a step of `nums` sequences takes without drafts, by number: on average, stalls aside, or, where there
        were few such steps, by the line through all there were; none where that is not known either."""
        usual = {num: statistics.median(all_) for num, all_ in self._plain.items()}
        kept = {num: [one for one in all_ if one < STALL * usual[num]] for num, all_ in self._plain.items()}
        known = {num: statistics.mean(all_) for num, all_ in kept.items()}
        if len(known) < 2:
            return known
        points = [(num, one) for num, all_ in kept.items() for one in all_]
        slope, start = statistics.linear_regression(*zip(*points, strict=True))
        return {num: known[num] if len(kept.get(num, ())) >= ENOUGH else start + slope * num for num in nums}

    def _seconds(self) -> float:
        """That drafters have taken so far."""
        return sum(drafter.seconds for drafter in self._speculator.stats) if self._speculator else 0.0

    def _watch(self, name: str, note: Any) -> None:
        method = getattr(self._speculator, name)

        def watched(*args: Any) -> None:
            within = self._seconds() - self._drafters  # since the last call of any of these: in a step
            started = time.perf_counter()
            method(*args)
            self._outside += time.perf_counter() - started
            self._within += within
            self._drafters = self._seconds()
            note(*args, within=within)

        setattr(self._speculator, name, watched)

    def _draft(self, *_: Any, within: float) -> None:
        self._num_seqs = 0

    def _stepped(self, num_seqs: int, num_tokens: int, took: float, *, within: float) -> None:
        self._num_seqs = num_seqs
        (self._drafted if num_tokens > num_seqs else self._plain)[num_seqs].append(took - within)

    def _verified(self, _: Any, __: int, num_accepted: int, num_again: int, *, within: float) -> None:
        if self._num_seqs:
            self._accepted[self._num_seqs] += num_accepted - num_again  # those have to be computed once more
