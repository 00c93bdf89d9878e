"""benchmarks/load.py against a small server that speaks both dialects."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import load  # noqa: E402
from load_prompts import Prompts, tokenize_topics  # noqa: E402
from load_server import serving  # noqa: E402

sys.path.remove(str(BENCHMARKS))

SHAPE = ["--input-tokens", "12", "--output-tokens", "4", "--num-requests", "6", "--warmup", "0"]


def bladellm_events(body: dict[str, Any]) -> list[dict[str, Any]]:
    """One chunk per token with cumulative usage; the third token has no text."""
    return [
        {
            "choices": [{"text": "" if i == 3 else "x", "finish_reason": "length" if i == 4 else ""}],
            "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": i, "total_tokens": 0},
            "error_info": None,
        }
        for i in range(1, body["max_tokens"] + 1)
    ]


def openai_events(body: dict[str, Any]) -> list[dict[str, Any]]:
    usage = {
        "prompt_tokens": len(body["prompt"]),
        "completion_tokens": body["max_tokens"],
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    chunks: list[dict[str, Any]] = [{"choices": [{"text": "x"}], "usage": None} for _ in range(body["max_tokens"])]
    return [*chunks, {"choices": [], "usage": usage}]


class Fake:
    """A server whose `events` are sent for each request; it notes how many were under way at once."""

    def __init__(
        self, events: Callable[[dict[str, Any]], list[dict[str, Any]]], done: bytes = b"data: [DONE]\n\n"
    ) -> None:
        self.events = events
        self.done = done
        self.bodies: list[dict[str, Any]] = []
        self.num_running = self.most_running = 0
        self.status = 200

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.Response(status=self.status, text="no room")
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        response = web.StreamResponse()
        await response.prepare(request)
        for event in self.events(body):
            await asyncio.sleep(0.002)
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.num_running -= 1
        await response.write(self.done)
        return response

    def report(self, *arguments: str) -> dict[str, Any]:
        async def run() -> dict[str, Any]:
            app = web.Application()
            app.add_routes([web.get("/v1/models", self.models), web.post("/v1/completions", self.completions)])
            async with TestServer(app) as server:
                return await load.run(load.parse(["--url", str(server.make_url("")).rstrip("/"), *SHAPE, *arguments]))

        return asyncio.run(run())


@pytest.mark.parametrize("events", [bladellm_events, openai_events])
def test_a_closed_loop_in_either_dialect(events: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
    fake = Fake(events)
    report = fake.report("--concurrency", "1,3")
    assert [run["concurrency"] for run in report["runs"]] == [1, 3]
    assert fake.most_running == 3
    for run in report["runs"]:
        assert (run["requests"], run["errors"], run["prompt_tokens"], run["output_tokens"]) == (6, 0, 72, 24)
        assert run["cached_tokens"] == (30 if events is openai_events else 0)
        assert run["output_tokens_per_second"] == pytest.approx(24 / run["seconds"], rel=0.05)
        for metric in ("ttft_ms", "itl_ms"):
            assert 1 < run[metric]["p50"] <= run[metric]["p99"] < 1000
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 12
    assert {(body["model"], body["ignore_eos"], body["min_tokens"]) for body in fake.bodies} == {("fake", True, 4)}


def test_tokens_without_text_are_arrivals_where_usage_tells() -> None:
    async def gaps(events: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> int:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", Fake(events).completions)])
        async with TestServer(app) as server, ClientSession() as session:
            body = {"prompt": [1, 2], "max_tokens": 4}
            result = await load.request(session, str(server.make_url("")).rstrip("/"), body)
        assert result.error == ""
        return len(result.gaps)

    assert asyncio.run(gaps(bladellm_events)) == asyncio.run(gaps(openai_events)) == 3


def test_an_open_loop_does_not_wait_for_answers() -> None:
    fake = Fake(openai_events)
    (run,) = fake.report("--rate", "2000")["runs"]
    assert (run["rate"], run["requests"], run["errors"]) == (2000, 6, 0)
    assert fake.most_running > 1


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    fake = Fake(openai_events)
    fake.report("--concurrency", "2", "--shared-prefix", "8")
    assert len({tuple(body["prompt"][:8]) for body in fake.bodies}) == 1
    assert len({tuple(body["prompt"][8:]) for body in fake.bodies}) == 6


def fewer_tokens(body: dict[str, Any]) -> list[dict[str, Any]]:
    return bladellm_events(body)[:-1]


def an_error(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"choices": [], "error_info": {"code": 500, "message": "The server failed."}}]


@pytest.mark.parametrize(
    ("fake", "status", "message"),
    [
        (Fake(fewer_tokens), 200, "asked for (12, 4) tokens of prompt and output, the server counts (12, 3)"),
        (Fake(an_error), 200, "The server failed."),
        (Fake(openai_events, done=b""), 200, "without [DONE]"),
        (Fake(openai_events), 503, "HTTP 503: no room"),
    ],
)
def test_errors_are_counted_and_shown(
    fake: Fake, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.status = status
    (run,) = fake.report("--concurrency", "2")["runs"]
    assert (run["errors"], run["output_tokens"], run["ttft_ms"]["p50"]) == (6, 0, None)
    assert message in capsys.readouterr().err


def test_percentiles() -> None:
    assert load.percentiles([]) == {"p50": None, "p99": None}
    assert load.percentiles([0.5]) == {"p50": 500, "p99": 500}
    assert load.percentiles([i / 1000 for i in range(101)]) == {"p50": 50, "p99": 99}


def test_prompts_are_exact_and_reproducible(tiny_llama: Path) -> None:
    text = tokenize_topics(tiny_llama)
    assert len(text) > 100_000
    for source in (text, None):
        prompts, again = (Prompts(source, 40, 10, seed=3) for _ in range(2))
        first, second = prompts.next(), prompts.next()
        assert len(first) == len(second) == 40
        assert first[:10] == second[:10]
        assert first != second
        assert (first, second) == (again.next(), again.next())
    with pytest.raises(SystemExit, match="cannot have"):
        Prompts(text[:5], 40, 0, seed=3).next()


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def log_message(self, *args): pass
assert sys.argv[1:4] == ["serve", "--plugin", "a b"], sys.argv
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_server_is_started_and_stopped() -> None:
    async def start_and_stop() -> tuple[float, bool]:
        async with serving("--plugin 'a b'", (sys.executable, "-c", SERVER)) as (url, seconds):
            pass
        async with ClientSession() as session:
            try:
                await session.get(f"{url}/health")
            except OSError:
                return seconds, True
        return seconds, False

    seconds, stopped = asyncio.run(start_and_stop())
    assert stopped
    assert 0 < seconds < 60


def test_a_server_that_does_not_start_is_told() -> None:
    async def start() -> None:
        async with serving("", (sys.executable, "-c", "raise SystemExit(7)")):
            pass

    with pytest.raises(SystemExit, match="exit status 7"):
        asyncio.run(start())
