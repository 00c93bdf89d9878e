"""The loop thread's end of a submit: outputs in, in the order of steps, for whoever iterates."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from blade.types import Output

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from blade.types import FinishReason


class OutputStream:
    """Outputs of the sequences of one submit (contracts.Stream). Only the loop thread touches it."""

    def __init__(self, seqs: Mapping[int, int], abort: Callable[[int], None]) -> None:
        """`seqs`: id -> index of the choice."""
        self._open = dict(seqs)
        self._abort = abort
        self._outputs: list[Output] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, output: Output) -> None:
        if output.seq_id not in self._open:
            return  # aborted while this was on its way
        self._outputs.append(output)
        if output.finish_reason is not None:
            del self._open[output.seq_id]
        self._wake()

    def abort(self, seq_id: int | None = None) -> None:
        for each in list(self._open) if seq_id is None else [seq_id]:
            if each in self._open:
                del self._open[each]
                self._abort(each)
        self._wake()

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        """No engine will answer any more: finish what is still open."""
        for seq_id, index in list(self._open.items()):
            self.push(Output(seq_id, index, [], reason, error=error))

    async def __aiter__(self) -> AsyncIterator[list[Output]]:
        while self._open or self._outputs:
            if not self._outputs:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            elif taken := self._outputs:
                self._outputs = []
                yield taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
