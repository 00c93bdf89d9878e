"""A job's generation as a response: a stream of events, or one body."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from blade.api.choice import Reply
from blade.api.dialects import DIALECTS
from blade.api.errors import Failure, failure_of
from blade.api.generation import Generation
from blade.api.http import ClientGone, EventStream, JSONResponse
from blade.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from blade.api.choice import Delta
    from blade.api.context import ServerContext
    from blade.api.dialects import Dialect
    from blade.api.http import HTTPRequest
    from blade.api.jobs import Job
    from blade.types import Output

log = logging.getLogger("blade.api")

MAX_REPLY_BYTES = 64 << 20
"""Bound of one reply. granian's RSGI takes every write of a stream at once and keeps in memory what a slow client does
not read, without telling how much that is; so the whole stream is the only thing that can be bounded. 64 MiB are over
150,000 tokens of plain chunks. Of a whole reply, which is held until it ends, it is the size to within a factor."""

LOGPROB_BYTES = 100  # of a token's log-probability as JSON, about, and in memory
LARGE_REPLY_BYTES = 64 << 10  # from which on a thread, which costs some 50 us, is worth while

_REMEDY = "Ask for fewer tokens (max_tokens), choices (n) or log-probabilities (logprobs, top_logprobs)."
STREAM_TOO_LONG = Failure(
    500, f"The stream has reached its bound of {MAX_REPLY_BYTES} bytes. {_REMEDY}", code="stream_too_long"
)
REPLY_TOO_LONG = Failure(
    400, f"The reply has reached its bound of {MAX_REPLY_BYTES} bytes. {_REMEDY}", code="reply_too_long"
)


async def respond(server: ServerContext, http: HTTPRequest, job: Job) -> JSONResponse | EventStream:
    """Raises Overloaded and whatever else fails before the first token; ClientGone when nobody is there to answer."""
    generation = Generation(server, job)
    dialect = DIALECTS[server.options.dialect](job, job.served_model, server.tokenizer, generation.usage)
    if not job.stream:
        return await _whole(generation, http, dialect)
    frames = _frames(generation, http, dialect)
    # The head goes out with the first frames, so that a failure before them still has its own status.
    return EventStream(frames, first=await anext(frames), outcome=lambda: generation.status)


async def _whole(generation: Generation, http: HTTPRequest, dialect: Dialect) -> JSONResponse:
    replies = [Reply(index, generation.job.logprobs) for index in range(len(generation.job.seqs))]
    failure, num_bytes = None, 0
    with generation.running(http) as stream:
        async for outputs in stream:
            for delta in generation.take(outputs):
                replies[delta.index].add(delta)
                num_bytes += _size(delta, generation.job.logprobs)
                if isinstance(delta.error, Overloaded):
                    raise delta.error
                if delta.error is not None:
                    failure = failure_of(delta.error)
                    generation.status = failure.status
            if failure is None and num_bytes > MAX_REPLY_BYTES:
                failure = REPLY_TOO_LONG
                generation.fail(failure)
            if failure is not None:
                break
        if generation.client_gone:
            raise ClientGone
    if failure is REPLY_TOO_LONG:
        return JSONResponse(dialect.error(failure), failure.status)
    if num_bytes < LARGE_REPLY_BYTES:
        return JSONResponse(dialect.reply(replies, failure), generation.status)
    # Log-probabilities take a second per 20 MB, for which the loop has others to serve.
    return await asyncio.to_thread(lambda: JSONResponse(dialect.reply(replies, failure), generation.status))


def _size(delta: Delta, with_logprobs: bool) -> int:
    """In bytes, about."""
    tokens = (*delta.sampled, *delta.end_token) if with_logprobs else ()
    return len(delta.text) + len(delta.reasoning) + LOGPROB_BYTES * sum(1 + len(token.top) for token in tokens)


async def _frames(generation: Generation, http: HTTPRequest, dialect: Dialect) -> AsyncGenerator[bytes, None]:
    """One item per wake-up: the chunks of all that the engine has brought since the last one."""
    num_bytes = 0
    with generation.running(http) as stream:
        try:
            async for outputs in stream:
                frames, failure = _frame(generation, outputs, dialect, begun=num_bytes > 0)
                num_bytes += len(frames)
                if num_bytes > MAX_REPLY_BYTES:
                    frames, failure = dialect.failure(STREAM_TOO_LONG), STREAM_TOO_LONG
                    generation.fail(STREAM_TOO_LONG)
                elif failure is not None:
                    generation.status = failure.status
                if frames:
                    yield frames
                if failure is not None:
                    break
        except Exception as error:
            if not num_bytes:
                raise
            log.exception("request %s failed while it streamed", generation.job.id)
            failure = failure_of(error)
            generation.status = failure.status
            yield dialect.failure(failure)
        if generation.client_gone:
            raise ClientGone
    yield dialect.end()


def _frame(
    generation: Generation, outputs: list[Output], dialect: Dialect, begun: bool
) -> tuple[bytes, Failure | None]:
    """(frames, why a choice has failed, which ends the stream). What fails before it has begun is raised."""
    frames = []
    for delta in generation.take(outputs):
        if delta.error is None:
            frames.append(dialect.frame(delta))
        elif begun:
            failure = failure_of(delta.error)
            frames.append(dialect.frame(delta, failure))
            return b"".join(frames), failure
        else:
            raise delta.error
    return b"".join(frames), None
