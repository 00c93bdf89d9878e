"""The app behind a real granian, on a socket."""

import asyncio
import gc
import io
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import uvloop

from blade.api.server import reserve, serve_http
from blade.config import ServerOptions
from blade.errors import ConfigError

from .fakes import Client, FakeEngine

Abort = Callable[[], None]


@asynccontextmanager
async def serving(client: Client, abort: Abort = lambda: None) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """(url, the event that stops it)"""
    address = reserve(client.server.options, has_key=False)
    stop, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(serve_http(client.app, client.server.options, address, stop, abort, ready.set))
    await ready.wait()
    try:
        yield address.url, stop
    finally:
        stop.set()
        await task


def on_socket(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work(), 20))


def client(engine: FakeEngine | None = None, dialect: str = "bladellm", **options: Any) -> Client:
    return Client(engine, dialect, options={"port": 0, "drain_seconds": 1.0} | options)


def test_streams_end_without_the_garbage_collector() -> None:
    """A transport kept alive by a reference cycle would leave the client waiting."""

    async def work() -> None:
        async with serving(client(FakeEngine("Hi"))) as (url, _), aiohttp.ClientSession(url) as http:
            for _ in range(3):
                async with http.post("/v1/completions", json={"prompt": "a", "stream": "true"}) as response:
                    text = await response.text()
                    assert text.endswith('"error_info":null,"model":""}\n\ndata: [DONE]\n\n')
            async with http.post("/v1/completions", data=io.BytesIO(b"x" * (5 << 20))) as response:
                assert response.status == 413
            async with http.head("/health") as response:
                assert (response.status, await response.read()) == (200, b"")
            async with http.get("/health") as response:
                assert await response.json() == {"status": "ok"}

    gc.collect()
    gc.disable()
    try:
        on_socket(work)
    finally:
        gc.enable()


@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
def test_the_official_client_works(dialect: str) -> None:
    from openai import AsyncOpenAI, BadRequestError, NotFoundError

    async def work() -> None:
        async with serving(client(FakeEngine("Hello"), dialect)) as (url, _):
            await talk(AsyncOpenAI(base_url=url + "/v1", api_key="any", max_retries=0))

    async def talk(ai: AsyncOpenAI) -> None:
        messages: Any = [{"role": "user", "content": "hi"}]
        whole = await ai.chat.completions.create(model="tiny", messages=messages)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Hello", "stop")
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 6
        chat = await ai.chat.completions.create(model="tiny", messages=messages, stream=True, logprobs=True)
        assert "".join([c.choices[0].delta.content or "" async for c in chat]) == "Hello"
        stream = await ai.completions.create(model="tiny", prompt=["a", "b"], stream=True, logprobs=1)
        texts = [(c.choices[0].index, c.choices[0].text) async for c in stream]
        assert "".join(text for index, text in texts if index == 1) == "Hello"
        assert [model.id async for model in ai.models.list()] == ["tiny"]
        assert (await ai.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(BadRequestError) as caught:
            await ai.completions.create(model="tiny", prompt="a", temperature=5)
        assert caught.value.param == "temperature"
        with pytest.raises(NotFoundError):
            await ai.completions.create(model="other", prompt="a")
        await ai.close()

    on_socket(work)


def test_cut_connections_stop_their_sequences_and_nothing_leaks() -> None:
    """200 streams, every other cut off midway: the rest end well, and 200 at once are not too many."""

    async def work() -> None:
        served = client(FakeEngine("x" * 400, pace=0.01))
        connector = aiohttp.TCPConnector(limit=0)
        async with serving(served) as (url, _), aiohttp.ClientSession(url, connector=connector) as http:
            ends = await asyncio.gather(*(one(http, cut=i % 2 == 0) for i in range(200)))
            assert sum(end.endswith(b"data: [DONE]\n\n") for end in ends) == 100
            async with http.get("/health") as response:
                assert response.status == 200
            while len(served.summaries) < 200:
                await asyncio.sleep(0.01)
        assert sorted(summary.status for summary in served.summaries) == [200] * 100 + [499] * 100
        assert len(served.engine.aborted) == 100

    async def one(http: aiohttp.ClientSession, cut: bool) -> bytes:
        body = {"prompt": "a", "stream": True, "max_tokens": 400 if cut else 30}
        async with http.post("/v1/completions", json=body) as response:
            if cut:
                first = await response.content.readany()
                response.close()
                return first
            return await response.read()

    on_socket(work)


def test_a_drain_lets_requests_end() -> None:
    async def work() -> None:
        served = client(FakeEngine("x" * 30, pace=0.01))
        body = {"prompt": "a", "stream": True, "max_tokens": 30}
        aborted = asyncio.Event()
        async with serving(served, abort=aborted.set) as (url, stop), aiohttp.ClientSession(url) as http:
            async with http.post("/v1/completions", json=body) as response:
                await response.content.readany()
                stop.set()
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            with pytest.raises(aiohttp.ClientConnectorError):
                await http.get("/health")
        assert not aborted.is_set()

    on_socket(work)


def test_after_the_drain_deadline_requests_are_aborted_with_a_last_chunk() -> None:
    async def work() -> None:
        served = client(FakeEngine("x" * 400, pace=0.02), drain_seconds=0.2)
        started = time.monotonic()
        async with (
            serving(served, abort=served.engine.drain) as (url, stop),
            aiohttp.ClientSession(url) as http,
            http.post("/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 400}) as response,
        ):
            await response.content.readany()
            stop.set()
            last, done, rest = (await response.read()).decode().rsplit("\n\n", 2)
        assert json.loads(last.rpartition("data: ")[2])["choices"][0]["finish_reason"] == "abort"
        assert (done, rest) == ("data: [DONE]", "")
        assert time.monotonic() - started < 2

    on_socket(work)


def test_a_client_that_does_not_read_does_not_hold_up_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blade.api.server.LAST_CHUNK_SECONDS", 0.1)

    async def work() -> None:
        served = client(drain_seconds=0.1)
        ask = {"prompt": "a", "stream": True, "max_tokens": 400, "ignore_eos": True, "n": 8, "logprobs": 20}
        body = json.dumps(ask).encode()  # about 6 MB of answer, more than the kernel's buffers hold
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            async with serving(served) as (url, _):
                deaf.connect(("127.0.0.1", int(url.rpartition(":")[2])))
                deaf.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                )
                while not served.summaries:
                    await asyncio.sleep(0.01)
                started = time.monotonic()
            assert 0.1 < time.monotonic() - started < 1.5

    on_socket(work)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 150 + b"\r\n", b"431"),
        (b"GET /%00%0d%0aSet-Cookie:x HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", b"200"),
    ],
    ids=["garbage", "large header", "many headers", "control characters", "websocket"],
)
def test_strange_heads_are_answered(head: bytes, status: bytes) -> None:
    async def work() -> None:
        async with serving(client()) as (url, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(head)
            assert (await reader.readline()).split()[1] == status
            writer.close()
            async with aiohttp.ClientSession(url) as http, http.get("/health") as response:
                assert response.status == 200

    on_socket(work)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/%68ealth", 200),
        ("/health%2F", 401),
        ("/health/..%2Fversion", 401),
        ("/version/../health", 401),
        ("/version/%2e%2e/health", 401),
        ("//health", 401),
        ("/%2Fhealth", 401),
        ("/health%00", 401),
        ("/health%3F", 401),
        ("/health?/../version", 200),
    ],
)
def test_what_is_public_is_decided_by_the_path_that_is_served(path: str, status: int) -> None:
    """granian hands a path over percent-decoded: whichever way it is spelt, keys and routes see the same one."""

    async def work() -> None:
        served = Client(options={"port": 0}, api_keys=("key",))
        async with serving(served) as (url, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            assert int(answer.split()[1]) == status
            assert (b'{"status":"ok"}' in answer) == (status == 200)

    on_socket(work)


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    async def work() -> None:
        async with serving(client()) as (url, _):
            port = int(url.rpartition(":")[2])
            with pytest.raises(ConfigError, match=rf"Port {port} on 127.0.0.1 is in use .* --port"):
                reserve(ServerOptions(port=port), has_key=False)

    on_socket(work)


def test_a_stop_before_the_start_is_a_clean_one() -> None:
    async def work() -> None:
        served = client()
        stop = asyncio.Event()
        stop.set()
        await serve_http(served.app, served.server.options, reserve(served.server.options, True), stop, lambda: None)

    on_socket(work)
