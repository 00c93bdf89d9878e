"""Whether steps still succeed at all, told apart from requests that fail through their own fault.

A device may break for good: every step fails at once from then on, quickly, and nothing stalls. But steps of bad
requests alone fail as well, and nobody shall be able to have a server restarted by sending some. So after a few failed
steps in a row the executor has to run one that nobody asked for, and only this one decides.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from blade.types import SamplingParams, Sequence, Step

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from blade.contracts import Blocks, Executor
    from blade.types import Sampled

log = logging.getLogger("blade.engine")

MANY_FAILED = 3  # steps in a row, before it is asked whose fault that is
PROBE_ID = -1  # of the sequence; no request has it


class Health:
    """The engine thread's own; the loop thread reads `failing`."""

    def __init__(self, executor: Executor, blocks: Blocks, forget: Callable[[Sequence], None]) -> None:
        """`forget`: tells all who may keep something of a sequence that it has ended. It does not raise."""
        self._executor = executor
        self._blocks = blocks
        self._forget = forget
        self._num_failed = 0  # steps in a row
        self.failing = False  # the executor fails whatever it is given, as far as is known

    def judge(self, results: Seq[list[Sampled] | Exception]) -> bool:
        """Take in a step's results, one per sequence, once those that failed hold no blocks any more. Whether the step
        failed: no sequence came through."""
        if not results:
            return False
        if not all(isinstance(result, Exception) for result in results):
            self._succeeded()
            return False
        self._num_failed += 1
        if self._num_failed >= MANY_FAILED and not self.failing:
            if self._probe():
                self._num_failed = 0
            else:
                self.failing = True
                log.error("%d steps have failed in a row, and one of blade's own after them", self._num_failed)
        return True

    def _succeeded(self) -> None:
        if self.failing:
            log.warning("a step has succeeded after %d that failed", self._num_failed)
        self._num_failed, self.failing = 0, False

    def _probe(self) -> bool:
        """Whether a step of one token succeeds. No room for it tells nothing against the executor."""
        seq = Sequence(PROBE_ID, [0], SamplingParams(max_tokens=1, temperature=0))
        if not self._blocks.grow(seq, 1):
            return True
        try:
            (result,) = self._executor.run(Step([seq], [1]))
        except Exception:
            log.exception("a step of blade's own failed")
            return False
        finally:
            self._blocks.release(seq)
            self._forget(seq)
        return not isinstance(result, Exception)
