"""One job from submit to its end: the engine's outputs in, deltas of text out, for streams and whole replies alike."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blade.api.choice import Choice
from blade.api.errors import failure_of
from blade.api.http import ClientGone
from blade.errors import Overloaded
from blade.text.stop import StopTable
from blade.types import RequestSummary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blade.api.choice import Delta
    from blade.api.context import ServerContext
    from blade.api.errors import Failure
    from blade.api.http import HTTPRequest
    from blade.api.jobs import Job
    from blade.contracts import Stream
    from blade.types import Output

log = logging.getLogger("blade.api")

CLIENT_GONE = 499  # nginx's status for a client that left


@dataclass(slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted_tokens: int = 0  # of the completion: foreseen by a drafter
    rejected_tokens: int = 0  # drafted and verified, but not what the model said

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Generation:
    """Use: ``with generation.running(http) as stream: async for outputs in stream: for delta in take(outputs): ...``"""

    def __init__(self, server: ServerContext, job: Job) -> None:
        self.job = job
        self.usage = Usage(prompt_tokens=sum(map(len, job.prompts)))
        self.client_gone = False
        self.status = 200  # of the response; of a stream, what its head would have said had it known the end
        self._server = server
        self._stream: Stream | None = None
        self._stops = StopTable(job.stop) if job.stop else None
        self._choices = [self._choice(i) for i in range(len(job.seqs))]
        self._last_output: list[float | None] = [None] * len(job.seqs)  # seconds, monotonic clock
        self._first_token: float | None = None

    def _choice(self, index: int) -> Choice:
        job, server = self.job, self._server
        return Choice(
            job.seqs[index],
            server.tokenizer,
            self._stops,
            continues=job.continues,
            echo=job.echo[index // job.n] if job.echo else "",
            reasoning_parser=server.reasoning_parser(server.tokenizer)
            if job.chat and server.reasoning_parser
            else None,
            tool_parser=server.tool_parser(server.tokenizer) if job.tools and server.tool_parser else None,
        )

    @contextmanager
    def running(self, http: HTTPRequest) -> Iterator[Stream]:
        """Submit and watch the client meanwhile; however this is left, nothing of the job keeps running. Raises what
        EngineClient.submit raises."""
        self._stream = stream = self._server.engine.submit(self.job.seqs)
        watcher = asyncio.ensure_future(http.disconnected())
        watcher.add_done_callback(self._on_disconnect)
        try:
            yield stream
        except (GeneratorExit, asyncio.CancelledError, ClientGone):
            self.client_gone = True
            raise
        except Exception as error:
            self.status = failure_of(error).status
            raise
        finally:
            watcher.cancel()
            stream.abort()
            self._finish(CLIENT_GONE if self.client_gone else self.status)

    def _on_disconnect(self, watcher: asyncio.Future[None]) -> None:
        if watcher.cancelled():
            return
        watcher.exception()  # taken, so that asyncio does not report it: either way the client has left
        self.client_gone = True
        if self._stream is not None:
            self._stream.abort()

    def take(self, outputs: list[Output]) -> Iterator[Delta]:
        """The deltas of some outputs; `usage` counts along with them. A choice that a stop string has ended is
        aborted in the engine."""
        now = time.monotonic()
        for output in outputs:
            choice = self._choices[output.index]
            if choice.finish_reason is not None:
                continue  # a stop string has ended it; this was on its way before the abort
            self._observe(output, now)
            try:
                deltas = choice.take(output)
            except Exception:  # of a plugin's parser
                choice.finish_reason = "error"
                raise
            num_accepted = min(output.num_accepted, sum(delta.num_tokens for delta in deltas))
            self.usage.accepted_tokens += num_accepted
            self.usage.rejected_tokens += output.num_drafted - num_accepted
            for delta in deltas:
                self.usage.completion_tokens += delta.num_tokens
                if delta.finish_reason == "abort" and not self.usage.completion_tokens:
                    delta.error = Overloaded("The server is stopping.", status=503, retry_after=10)
                yield delta
            if choice.finish_reason is not None and output.finish_reason is None and self._stream is not None:
                self._stream.abort(output.seq_id)

    def fail(self, failure: Failure) -> None:
        """The reply ends with this for all choices that have not ended yet, rather than for one of them."""
        self.status = failure.status
        for choice in self._choices:
            choice.finish_reason = choice.finish_reason or "error"

    def _observe(self, output: Output, now: float) -> None:
        if not output.sampled:
            return
        if self._first_token is None:
            self._first_token = now
        last = self._last_output[output.index]
        if last is not None:
            num_tokens = len(output.sampled)
            self._server.metrics.inter_token.observe((now - last) / num_tokens, num_tokens)
        elif output.index % self.job.n == 0:  # the others of its prompt find what this one has computed
            self.usage.cached_tokens += output.num_cached
        self._last_output[output.index] = now

    def _finish(self, status: int) -> None:
        """Tell those who count; a failing observer harms nobody else."""
        job, now = self.job, time.monotonic()
        started = job.seqs[0].first_scheduled
        summary = RequestSummary(
            request_id=job.id,
            endpoint=job.endpoint,
            model=job.served_model,
            num_choices=len(job.seqs),
            prompt_tokens=self.usage.prompt_tokens,
            cached_tokens=self.usage.cached_tokens,
            completion_tokens=self.usage.completion_tokens,
            finish_reasons=tuple(choice.finish_reason or "abort" for choice in self._choices),
            queue_seconds=None if started is None else started - job.arrival,
            first_token_seconds=None if self._first_token is None else self._first_token - job.arrival,
            total_seconds=now - job.arrival,
            status=status,
        )
        self._server.metrics.finished(summary)
        try:
            self._server.request_finished(summary)
        except Exception:
            log.exception("request_finished failed for request %s", job.id)
