"""Steps begun before the step ahead of them is booked: the host prepares one while the device runs the other.

What a step draws may stay on the device until the next one has been launched: where it ends, its slots and its length
are known beforehand, only its ids are not. Where a token turns out to end its sequence, the next step has a row for
nothing, which nobody reads; its slot belongs to nobody by then, and who gets the block stores to it later in the
stream.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from blade.types import Step

if TYPE_CHECKING:
    from collections.abc import Collection

    from blade.config import EngineConfig
    from blade.contracts import BegunStep, Executor, Overlapping, Scheduler
    from blade.engine.blocks import BlockPool
    from blade.types import Limits, Sequence

log = logging.getLogger("blade.engine")
MOST_IN_A_ROW = 8  # steps begun ahead of a scheduler that has somebody waiting


@dataclass(slots=True)
class Flight:
    """A step between its schedule and its booking."""

    step: Step
    began: float  # monotonic seconds
    begun: BegunStep | None  # None: it is still to be run
    num_ahead: int = 0  # steps in a row that the scheduler was not asked for, this one among them
    wrong: Collection[int] = ()  # ids of sequences whose row is for nothing: it took another token for their last

    def is_of_use(self, seq: Sequence) -> bool:
        """Whether the sequence's result is to be booked: it has not ended since."""
        return seq.finish_reason is None and seq.id not in self.wrong

    def of_use(self) -> Step:
        step = Step()
        for seq, num_tokens in zip(self.step.seqs, self.step.num_tokens, strict=True):
            if self.is_of_use(seq):
                step.add(seq, num_tokens)
        return step


class Overlap:
    """Begins steps, and those that follow them."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        blocks: BlockPool,
        limits: Limits,
        config: EngineConfig,
        enabled: bool = True,
    ) -> None:
        self._executor = executor
        self._enabled = enabled and not config.disable_overlap and hasattr(executor, "begin")
        self._scheduler, self._blocks, self._limits = scheduler, blocks, limits
        self._max_num_seqs = config.max_num_seqs

    def begin(self, step: Step) -> Flight:
        """A scheduled step, begun where that is possible."""
        began = time.monotonic()
        return Flight(step, began, self._try(step))

    def follow(self, flight: Flight) -> Flight | None:
        """The step after this one, begun: one more token of everybody who has none to be the last. None where more is
        to be decided, or known first."""
        if flight.begun is None or not self._may_go_on(flight):
            return None
        seqs = [seq for seq in flight.step.seqs if flight.is_of_use(seq) and self._goes_on(seq)]
        if not seqs or not all(self._blocks.grow(seq, seq.num_owed + 1) for seq in seqs):
            return None
        began, step = time.monotonic(), Step(seqs, [1] * len(seqs))
        begun = self._try(step, flight.begun)
        return Flight(step, began, begun, flight.num_ahead + 1) if begun else None

    def _try(self, step: Step, after: BegunStep | None = None) -> BegunStep | None:
        """What raises is left to Executor.run, which will raise again."""
        try:
            return cast("Overlapping", self._executor).begin(step, after) if self._enabled else None
        except Exception:
            log.exception("a step of %d sequences could not be begun", len(step))
            return None

    def _may_go_on(self, flight: Flight) -> bool:
        """Whether the scheduler, once this step is booked, could but let everybody who runs go on."""
        scheduler, step = self._scheduler, flight.step
        if scheduler.waiting and (len(scheduler.running) < self._max_num_seqs or flight.num_ahead >= MOST_IN_A_ROW):
            return False
        pairs = zip(step.seqs, step.num_tokens, strict=True)
        owed = {seq.id: num for seq, num in pairs if flight.is_of_use(seq)}
        return all(owed.get(seq.id) == seq.num_owed for seq in scheduler.running)

    def _goes_on(self, seq: Sequence) -> bool:
        longest = min(seq.params.max_tokens, self._limits.max_context - len(seq.prompt_ids))
        return len(seq.output_ids) + 1 < longest
