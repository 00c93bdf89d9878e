"""The running server, as hooks and routes see it. See blade.contracts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from collections.abc import Sequence as Seq

    from blade.contracts.text import Tokenizer
    from blade.types import EngineStats, Limits, Output, Sequence


class Stream(Protocol):
    """The outputs of the sequences of one submit, as they come; ends when all of them have finished."""

    def __aiter__(self) -> AsyncIterator[list[Output]]:
        """Lists of outputs: all that has come since the last one was taken, oldest first."""
        ...

    def abort(self, seq_id: int | None = None) -> None:
        """Stop one sequence, or all of them, within a step. No further output of theirs comes; their blocks are
        free and their prefix stays cached. Harmless when they have ended."""
        ...


class EngineClient(Protocol):
    """What the loop thread may ask of the engine thread."""

    limits: Limits

    def submit(self, seqs: Seq[Sequence]) -> Stream:
        """Queue sequences, all or none. Raises RequestError when one can never fit, Overloaded when the queue is
        full."""
        ...

    def stats(self) -> EngineStats: ...

    def healthy(self) -> bool:
        """True while the engine is idle or its steps complete, and not all of them fail."""
        ...


class Request(Protocol):
    """What a route handler sees of an HTTP request."""

    @property
    def method(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def query(self) -> Mapping[str, str]: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""
        ...

    async def body(self) -> bytes: ...

    async def disconnected(self) -> None:
        """Returns when the client has gone."""
        ...


class Response(Protocol):
    """What a route handler returns; `blade.api.http` has JSONResponse, TextResponse and EventStream."""

    status: int


class Server(Protocol):
    """The running server, as lifespan hooks and routes see it."""

    engine: EngineClient
    tokenizer: Tokenizer
    model_name: str
    url: str


RouteHandler = Callable[[Server, Request], Awaitable[Response]]
