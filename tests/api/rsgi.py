"""The browser's side of RSGI: requests without a socket."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from granian.rsgi import ProtocolClosed


class FakeHeaders(dict[str, str]):
    """granian's, as far as it is used."""


@dataclass
class FakeScope:
    method: str
    path: str
    headers: FakeHeaders
    query_string: str = ""
    client: str = "127.0.0.1:5"


class FakeTransport:
    def __init__(self, proto: FakeProto) -> None:
        self._proto = proto

    async def send_bytes(self, data: bytes) -> None:
        if self._proto.gone.is_set():
            raise ProtocolClosed
        self._proto.sent.append(data)


class FakeProto:
    """granian's RSGI protocol. `gone` is the client leaving."""

    def __init__(self, body: bytes, chunk_delay: float = 0.0) -> None:
        self._body = body
        self._chunk_delay = chunk_delay
        self.gone = asyncio.Event()
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.sent: list[bytes] = []

    async def __aiter__(self) -> Any:
        for start in range(0, len(self._body), 1000):
            await asyncio.sleep(self._chunk_delay)
            yield self._body[start : start + 1000]

    async def client_disconnect(self) -> None:
        await self.gone.wait()

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status, self.headers = status, headers
        self.sent.append(body)

    def response_stream(self, status: int, headers: list[tuple[str, str]]) -> FakeTransport:
        self.status, self.headers = status, headers
        return FakeTransport(self)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, which has to end with [DONE]."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
