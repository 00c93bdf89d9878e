"""HTTP as route handlers see it: a request that is read within limits, and the kinds of response."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import msgspec

from blade.errors import BladeError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from granian.rsgi import HTTPProtocol, Scope  # type: ignore[attr-defined]

    from blade.config import ServerOptions

Headers = list[tuple[str, str]]

NUM_QUERY_FIELDS = 64


class HTTPError(BladeError):
    """A request that HTTP itself refuses; the other errors a client may see are those of blade.errors."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or []


class ClientGone(Exception):
    """The client has left before the response began: there is nobody to answer."""


class HTTPRequest:
    """One request over granian's RSGI (contracts.Request)."""

    def __init__(self, scope: Scope, proto: HTTPProtocol, options: ServerOptions) -> None:
        self.method = scope.method
        self.path = scope.path
        self.headers = dict(scope.headers.items())  # names come in lower case
        self.id = ""  # set by the app: the client's own, else a fresh one
        self.tenant = b""  # set by the app: whose API key this is; prefixes are cached per tenant
        self.pattern: str | None = None  # set by the app once it lets the request in: the route its path falls under
        self._scope = scope
        self._proto = proto
        self._options = options

    @property
    def query(self) -> dict[str, str]:
        try:
            return dict(parse_qsl(self._scope.query_string, keep_blank_values=True, max_num_fields=NUM_QUERY_FIELDS))
        except ValueError:
            raise HTTPError(400, f"The query string has more than {NUM_QUERY_FIELDS} fields.") from None

    async def body(self) -> bytes:
        """The whole body; granian bounds neither its size nor the time it takes, so both are bounded here."""
        limit, seconds = self._options.max_body_bytes, self._options.body_seconds
        declared = self.headers.get("content-length", "")
        if self.headers.get("content-encoding", "identity") != "identity":
            raise HTTPError(415, "A content-encoding is not supported: send the body as it is.")
        if declared and "transfer-encoding" in self.headers:
            raise HTTPError(400, "content-length and transfer-encoding contradict each other.")
        body = bytearray()
        try:
            if declared.isdecimal() and int(declared[:20]) > limit:
                raise _too_large(limit)
            async with asyncio.timeout(seconds):
                async for chunk in self._proto:
                    body += chunk
                    if len(body) > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise HTTPError(408, f"The body did not arrive within {seconds:g} s.") from None
        if declared.isdecimal() and len(body) != int(declared[:20]):  # the connection broke; granian does not say so
            raise HTTPError(400, f"The body is incomplete: {len(body)} of {declared[:20]} bytes arrived.")
        return bytes(body)

    async def disconnected(self) -> None:
        await self._proto.client_disconnect()


def _too_large(limit: int) -> HTTPError:
    return HTTPError(413, f"The body is larger than {limit} bytes.")


class Response:
    """A whole response, sent at once."""

    content_type = "application/octet-stream"

    def __init__(self, body: bytes, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> None:
        self.status = status
        self.body = body
        self.headers: Headers = [("content-type", self.content_type), *headers]

    async def send(self, proto: HTTPProtocol) -> int:
        """Returns the status to count it under."""
        proto.response_bytes(self.status, self.headers, self.body)
        return self.status


class JSONResponse(Response):
    """Anything msgspec can encode."""

    content_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(msgspec.json.encode(content), status, headers)


class TextResponse(Response):
    content_type = "text/plain; charset=utf-8"

    def __init__(self, text: str, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(text.encode(), status, headers)


class EventStream:
    """Server-sent events: each item of `frames` is one write of whole `data: ...` frames.

    `first` goes out together with the head, so that a handler can wait for it and still answer with another status.
    `outcome` tells, once all has gone out, which status to count it under: what fails later has said 200 already.
    """

    status = 200

    def __init__(
        self, frames: AsyncGenerator[bytes, None], first: bytes = b"", outcome: Callable[[], int] = lambda: 200
    ) -> None:
        self.headers: Headers = [
            ("content-type", "text/event-stream; charset=utf-8"),
            ("cache-control", "no-cache"),
            ("x-accel-buffering", "no"),
        ]
        self._frames = frames
        self._first = first
        self._outcome = outcome

    async def send(self, proto: HTTPProtocol) -> int:
        """Write until the frames or the client end; returns the status to count it under. The response ends when
        `transport` is freed: it must not be stored anywhere."""
        try:
            transport = proto.response_stream(self.status, self.headers)
            if self._first:
                await transport.send_bytes(self._first)
            async for frame in self._frames:
                await transport.send_bytes(frame)
            del transport
            return self._outcome()
        finally:
            await self._frames.aclose()
