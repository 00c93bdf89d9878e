"""The engine thread: inbox in, steps, outputs out.

Two crossings between the threads and no lock: the loop thread puts Submit, Abort and Stop into one inbox; the engine
thread answers with one `call_soon_threadsafe` per step, carrying everybody's new tokens. While there is nothing to do
it sleeps on the inbox.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from blade.engine.health import Health
from blade.engine.overlap import Overlap
from blade.engine.pace import Pace
from blade.engine.stream import OutputStream
from blade.engine.trees import num_in_place
from blade.errors import Overloaded, RequestError
from blade.types import EngineStats, Output, Step

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from blade.config import EngineConfig
    from blade.contracts import Executor, Scheduler
    from blade.engine.blocks import BlockPool
    from blade.engine.overlap import Flight
    from blade.engine.speculation import Speculator
    from blade.types import FinishReason, Limits, Sampled, Sequence

log = logging.getLogger("blade.engine")


@dataclass(slots=True, frozen=True)
class Submit:
    seqs: list[Sequence]


@dataclass(slots=True, frozen=True)
class Abort:
    seq_id: int


@dataclass(slots=True, frozen=True)
class Stop:
    """Finish everybody with "abort" and end the thread."""


class Engine:
    """Runs sequences to their end (contracts.EngineClient on the loop's side)."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        blocks: BlockPool,
        config: EngineConfig,
        limits: Limits,
        speculator: Speculator | None = None,
    ) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.blocks = blocks
        self.config = config
        self.limits = limits
        self.speculator = speculator
        self._inbox: SimpleQueue[Submit | Abort | Stop] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="blade-engine", daemon=True)
        # The loop thread's own:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[int, OutputStream] = {}
        self._closed = False  # nothing is taken in any more
        self._ended = False  # the thread has said its last word
        self._stall_reported: float | None = None  # start of the step whose stall is in the log
        self._num_submitted = 0  # not yet seen by the engine thread; counts towards the queue's bound
        self._stats = EngineStats(blocks_total=blocks.num_blocks, blocks_free=blocks.num_blocks)
        # The engine thread's own; the loop thread reads the last:
        self._seqs: dict[int, Sequence] = {}
        self._pace = Pace(config.max_step_seconds, config.max_batch_tokens)
        self._counters: Counter[str] = Counter()  # by the names of EngineStats
        self._step_seconds = 0.0
        self._num_received = 0  # sequences taken in since the last delivery
        self._busy_since: float | None = None  # start of the step under way; None when asleep
        self._overlap = Overlap(executor, scheduler, blocks, limits, config, enabled=speculator is None)
        self._health = Health(executor, blocks, self._forget)
        self._flight: Flight | None = None  # a step that has been begun already
        self._landed = 0.0  # when the last step's results were there

    # ------------------------------------------------------------------------------------------ loop thread

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; outputs are delivered in `loop`."""
        self._loop = loop
        self._thread.start()

    def submit(self, seqs: Seq[Sequence]) -> OutputStream:
        for seq in seqs:
            self._refuse_if_too_long(seq)
        if self._closed or not self._thread.is_alive():
            raise Overloaded("The engine has stopped.", status=503, retry_after=10)
        num_queued = self._stats.num_waiting + self._num_submitted
        if num_queued and num_queued + len(seqs) > self.config.max_queue_size:
            raise Overloaded(f"{num_queued} sequences are waiting already; try again later.", status=429, retry_after=5)
        now = time.monotonic()
        for seq in seqs:  # a prompt that took long to make comes after those that run already
            seq.arrival = now
        stream = OutputStream({seq.id: seq.index for seq in seqs}, self.abort)
        self._streams |= dict.fromkeys((seq.id for seq in seqs), stream)
        self._num_submitted += len(seqs)
        self._inbox.put(Submit(list(seqs)))
        return stream

    def abort(self, seq_id: int) -> None:
        """Stop one sequence within a step. Harmless for one that has ended."""
        if self._streams.pop(seq_id, None) is not None:
            self._inbox.put(Abort(seq_id))

    def stats(self) -> EngineStats:
        return self._stats

    def healthy(self) -> bool:
        busy_since = self._busy_since
        stalled = busy_since is not None and time.monotonic() - busy_since > self.config.stall_seconds
        if stalled and self._stall_reported != busy_since:
            self._stall_reported = busy_since
            log.error("a step has taken longer than %g s; where every thread is:", self.config.stall_seconds)
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        return self._thread.is_alive() and not self._ended and not stalled and not self._health.failing

    def stop(self) -> None:
        """Finish every sequence with "abort" after the step under way, and end the thread. Returns at once."""
        self._closed = True
        self._inbox.put(Stop())

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the thread to end; True if it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _refuse_if_too_long(self, seq: Sequence) -> None:
        num_tokens = len(seq.prompt_ids) + seq.params.max_tokens
        capacity = min(self.blocks.num_blocks * self.blocks.block_size, self.limits.max_context)
        if not seq.prompt_ids:
            raise RequestError("The prompt is empty.", param="prompt")
        if num_tokens > capacity:
            raise RequestError(
                f"prompt and max_tokens need {num_tokens} tokens, at most {capacity} fit.",
                param="max_tokens",
                remedy="Shorten one of them.",
            )

    def _deliver(self, outputs: list[Output], num_received: int, stats: EngineStats) -> None:
        """The only way back from the engine thread, once per step."""
        self._num_submitted -= num_received
        self._stats = stats
        for output in outputs:
            stream = self._streams.get(output.seq_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._streams[output.seq_id]
            stream.push(output)

    def _close(self, reason: FinishReason, error: Exception | None) -> None:
        """The engine thread's last word: also for those whose Submit it has not seen."""
        self._closed = self._ended = True
        for stream in {id(stream): stream for stream in self._streams.values()}.values():
            stream.end(reason, error)
        self._streams.clear()

    # ------------------------------------------------------------------------------------------ engine thread

    def _main(self) -> None:
        reason: FinishReason = "abort"
        error: Exception | None = None
        try:
            while self._receive():
                self._busy_since = time.monotonic()
                outputs = self._expire() + self._step()
                self._busy_since = None
                self._send(outputs)
        except BaseException:  # of blade's own, or a plugin's: sys.exit and panics of Rust code are no Exceptions
            reason, error = "error", RuntimeError("engine failure")
            log.exception("the engine thread has died")
        finally:
            self._wind_up(reason, error)

    def _wind_up(self, reason: FinishReason, error: Exception | None) -> None:
        """Whatever has happened, and happens here: nobody may wait for ever."""
        try:
            for seq in list(self._seqs.values()):
                with suppress(BaseException):  # whoever broke the engine may break this as well
                    self._end(seq, reason)
            with suppress(BaseException):
                self._send([])
        finally:
            self._call_loop(self._close, reason, error)
            self.executor.close()

    def _receive(self) -> bool:
        """Take in all messages, waiting for one when there is nothing to run. False: stop."""
        block = not self._seqs
        while True:
            try:
                message = self._inbox.get(block=block)
            except Empty:
                return True
            block = False
            match message:
                case Stop():
                    return False
                case Submit(seqs):
                    self._num_received += len(seqs)
                    for seq in seqs:
                        self._seqs[seq.id] = seq
                        self.scheduler.add(seq)
                case Abort(seq_id):
                    if seq_id in self._seqs:
                        self._end(self._seqs[seq_id], "abort")

    def _expire(self) -> list[Output]:
        """End the sequences that have waited for their first step longer than max_queue_time."""
        longest = self.config.max_queue_time
        if longest is None:
            return []
        now = time.monotonic()
        late = [s for s in self.scheduler.waiting if s.first_scheduled is None and now - s.arrival > longest]
        error = Overloaded(f"The request waited longer than {longest:g} s; try again later.", status=503, retry_after=5)
        return [self._end(seq, "error", error) for seq in late]

    def _step(self) -> list[Output]:
        """Book one step. Where that is possible the next one is begun before this one's results are waited for."""
        if not self._seqs:
            self._flight = None  # of sequences that have ended
            return []
        flight = self._flight or self._overlap.begin(self._schedule())
        self._flight = self._overlap.follow(flight)
        results = self._land(flight)
        step, landed = flight.step, time.monotonic()
        seconds = landed - max(flight.began, self._landed)
        self._landed = landed
        self._learn(step, seconds)
        outputs, booked = [], []
        for seq, num_tokens, result in zip(step.seqs, step.num_tokens, results, strict=True):
            if not flight.is_of_use(seq):
                continue
            booked.append(result)
            if isinstance(result, Exception):
                outputs.append(self._end(seq, "error", result))
            elif output := self._commit(seq, num_tokens, result):
                outputs.append(output)
        self._counters["steps"] += 1
        self._counters["steps_failed"] += self._health.judge(booked)
        self._step_seconds += time.monotonic() - landed + seconds
        return outputs

    def _schedule(self) -> Step:
        self._draft()
        self.scheduler.max_prompt_tokens = self._pace.num_tokens
        step = self.scheduler.schedule()
        if not len(step):
            raise RuntimeError("sequences are waiting, yet the scheduler runs none")
        step.num_tokens = [self.blocks.chunk(seq, num) for seq, num in zip(step.seqs, step.num_tokens, strict=True)]
        started = time.monotonic()
        for seq in step.seqs:
            if seq.first_scheduled is None:
                seq.first_scheduled = started
                seq.num_cached = seq.computed
                self._counters["prompt_tokens"] += len(seq.prompt_ids)
                self._counters["prompt_tokens_cached"] += seq.num_cached
        return step

    def _land(self, flight: Flight) -> list[list[Sampled] | Exception]:
        """The results of a step that was scheduled."""
        if flight.begun is None:
            return self._run(flight.step)
        try:
            results = flight.begun.results()
        except Exception:
            log.exception("a step of %d sequences failed", len(flight.step))
            self._flight = None  # it went on from that
            flight.step = flight.of_use()
            return self._run(flight.step)
        if self._flight is not None:
            self._flight.wrong = flight.begun.wrong
        return results

    def _learn(self, step: Step, seconds: float) -> None:
        """From what a step has taken; its results are not booked yet."""
        owed = zip(step.seqs, step.num_tokens, strict=True)
        num_prompt_tokens = sum(num for seq, num in owed if seq.num_owed > 1 + len(seq.draft_ids))
        if num_prompt_tokens:
            self._pace.learn(num_prompt_tokens, sum(step.num_tokens), seconds)
        elif self.speculator is not None:
            self.speculator.stepped(len(step), sum(step.num_tokens), seconds)

    def _draft(self) -> None:
        """Have drafts made for those that only owe their next token."""
        if self.speculator is not None:
            running = self.scheduler.running
            seqs = [seq for seq in running if seq.num_owed == 1]
            with_prompts = len(seqs) < len(running) or len(self.scheduler.waiting) > 0
            self.speculator.draft(seqs, with_prompts)

    def _run(self, step: Step) -> list[list[Sampled] | Exception]:
        """Run the step; if it fails as a whole, run it one by one to find out whose fault it is. Running a step again
        stores the same KV in the same slots, so the innocent lose nothing."""
        if not len(step):
            return []
        try:
            results = self.executor.run(step)
            if len(results) != len(step):
                raise RuntimeError(f"the executor returned {len(results)} results for {len(step)} sequences")
            return results
        except Exception as error:
            log.exception("a step of %d sequences failed", len(step))
            if len(step) == 1:
                return [error]
        alone = (Step([seq], [num]) for seq, num in zip(step.seqs, step.num_tokens, strict=True))
        return [result for one in alone for result in self._run(one)]

    def _commit(self, seq: Sequence, num_tokens: int, sampled: list[Sampled]) -> Output | None:
        """Book what a step computed and sampled; None when it sampled nothing."""
        if not sampled:
            seq.draft_ids = []
            self.blocks.advance(seq, num_tokens, min(seq.computed + num_tokens, seq.num_tokens - 1))
            return None
        num_drafted, num_before = len(seq.draft_ids), len(seq.output_ids)
        num_right = num_in_place(seq, [token.token_id for token in sampled])
        seq.draft_ids = []
        finish_reason: FinishReason | None = None
        for token in sampled:
            seq.output_ids.append(token.token_id)
            finish_reason = self._finish_reason(seq, token.token_id)
            if finish_reason is not None:
                break
        num_taken = len(seq.output_ids) - num_before
        num_accepted = min(num_taken, len(sampled) - 1)  # the last one sampled is the model's own
        # The last token's KV is never there yet, and a rejected draft's never counts. Nor does what was accepted of a
        # tree and lies elsewhere: that is owed again.
        num_sure = min(seq.computed + num_tokens - num_drafted + num_right, seq.num_tokens - 1)
        self.blocks.advance(seq, num_tokens, num_sure)
        self._counters["generated_tokens"] += num_taken
        self._counters["draft_tokens"] += num_drafted
        self._counters["draft_tokens_accepted"] += num_accepted
        if self.speculator is not None and num_drafted:
            self.speculator.verified(seq, num_drafted, num_accepted, max(0, num_accepted - num_right))
        if finish_reason is not None:
            self._end(seq, finish_reason)
        return Output(
            seq.id,
            seq.index,
            sampled[:num_taken],
            finish_reason,
            seq.num_cached,
            num_drafted=num_drafted,
            num_accepted=num_accepted,
        )

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        num_output = len(seq.output_ids)
        if token_id in seq.params.stop_token_ids and num_output > seq.params.min_tokens:
            return "stop"
        full = len(seq.prompt_ids) + num_output >= self.limits.max_context
        return "length" if full or num_output >= seq.params.max_tokens else None

    def _end(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> Output:
        """Take the sequence out of everything. Its blocks are free from now on, its prefix stays cached."""
        seq.finish_reason = reason
        del self._seqs[seq.id]
        self.scheduler.remove(seq)
        self.blocks.release(seq)
        self._forget(seq)
        self._counters["preemptions"] += seq.num_preemptions
        return Output(seq.id, seq.index, [], reason, seq.num_cached, error)

    def _forget(self, seq: Sequence) -> None:
        try:
            self.executor.forget(seq)
        except Exception:
            log.exception("the executor could not forget sequence %d", seq.id)
        if self.speculator is not None:
            self.speculator.forget(seq)

    def _send(self, outputs: list[Output]) -> None:
        blocks = self.blocks
        stats = EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            blocks_total=blocks.num_blocks,
            blocks_free=blocks.num_free - blocks.num_cached,
            blocks_cached=blocks.num_cached,
            blocks_used=blocks.num_used,
            step_seconds=self._step_seconds,
            drafters=self.speculator.stats if self.speculator else (),
            **self._counters,
        )
        self._call_loop(self._deliver, outputs, self._num_received, stats)
        self._num_received = 0

    def _call_loop(self, function: Callable[..., None], *args: object) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has closed: nobody listens
                self._loop.call_soon_threadsafe(function, *args)
