"""How a generation ends other than well: the client leaves, the queue is full, the server stops, a plugin breaks."""

import asyncio
import json
import logging
import threading
from typing import Any

import pytest

from blade.api import replies
from blade.api.choice import Delta, Reply
from blade.api.http import EventStream, JSONResponse
from blade.errors import Overloaded, RequestError
from blade.types import Sampled

from .fakes import Client, FakeEngine, complete, run
from .rsgi import FakeProto

QUEUE_FULL = Overloaded("9 sequences are waiting already.", status=429, retry_after=5)
WAITED = Overloaded("The request waited longer than 3 s.", status=503, retry_after=7)


async def leave(client: Client, proto: FakeProto, body: dict[str, Any], when: Any) -> None:
    """Ask, and go away once `when()`."""
    asking = asyncio.create_task(client.post("/v1/completions", body, proto=proto))
    while not when():
        await asyncio.sleep(0.001)
    proto.gone.set()
    await asking


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_when_the_client_leaves_its_sequences_stop(stream: bool, started: bool) -> None:
    async def work() -> None:
        engine = FakeEngine("x" * 400, pace=0.001, gate=None if started else asyncio.Event())
        client = Client(engine)
        body = {"prompt": "abc", "max_tokens": 400, "n": 2, "stream": stream}
        proto = FakeProto(json.dumps(body).encode())
        await leave(client, proto, body, lambda: engine.seqs and (not started or engine.seqs[0].output_ids))
        assert sorted(engine.aborted) == [0, 1]
        assert client.summaries[0].status == 499
        assert client.summaries[0].finish_reasons == ("abort", "abort")
        if engine.gate is not None:
            assert proto.sent == []
            engine.gate.set()
        await asyncio.gather(*engine.tasks)
        assert (await client.complete()).status == 200

    run(work())


def test_a_write_to_a_client_that_has_gone_ends_it_too() -> None:
    async def work() -> None:
        client = Client(FakeEngine("x" * 400))
        proto = FakeProto(b'{"prompt": "abc", "stream": true}')
        proto.gone.set()
        await client.request("POST", "/v1/completions", proto=proto)
        assert client.engine.aborted == [0]
        assert client.summaries[0].status == 499

    run(work())


def test_outputs_that_wait_go_out_in_one_write() -> None:
    async def work() -> None:
        client = Client(FakeEngine("Hello"))
        proto = FakeProto(b'{"prompt": "abc", "n": 3, "stream": true}')
        await client.request("POST", "/v1/completions", proto=proto)
        assert all(write.count(b"data: ") == 3 for write in proto.sent[:-1])
        assert proto.sent[-1] == b"data: [DONE]\n\n"

    run(work())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
@pytest.mark.parametrize(
    ("engine", "status", "retry_after"),
    [
        (lambda: FakeEngine(refuse=QUEUE_FULL), 429, "5"),
        (lambda: FakeEngine(fail_at=0, error=WAITED), 503, "7"),
        (lambda: FakeEngine(draining=True), 503, "10"),
    ],
)
def test_an_overload_is_a_real_status(stream: bool, dialect: str, engine: Any, status: int, retry_after: str) -> None:
    answer = complete(engine(), dialect, stream=stream)
    assert (answer.status, answer.headers["retry-after"]) == (status, retry_after)
    assert answer.headers["content-type"] == "application/json"


def test_a_refusal_of_the_engine_names_its_field() -> None:
    answer = complete(FakeEngine(refuse=RequestError("Too much.", "max_tokens", "Ask for less.")), "openai")
    assert (answer.status, answer.json["error"]["param"]) == (400, "max_tokens")
    assert answer.json["error"]["message"] == "Too much. Ask for less."


@pytest.mark.parametrize(("dialect", "reason"), [("bladellm", "abort"), ("openai", "length")])
def test_a_drain_ends_a_stream_with_a_proper_last_chunk(dialect: str, reason: str) -> None:
    async def work() -> None:
        client = Client(FakeEngine("x" * 400, pace=0.001), dialect)
        asking = asyncio.create_task(client.complete(max_tokens=400, stream=True))
        while not (client.engine.seqs and client.engine.seqs[0].output_ids):
            await asyncio.sleep(0.001)
        client.engine.drain()
        answer = await asking
        assert answer.events[-1]["choices"][0]["finish_reason"] == reason
        assert client.summaries[0].finish_reasons == ("abort",)

    run(work())


def test_one_failing_choice_ends_the_others() -> None:
    client = Client(FakeEngine("Hello", fail_at=1))
    events = run(client.complete(n=2, stream=True)).events
    assert events[-1]["choices"][0]["finish_reason"] == "error"
    assert client.engine.aborted == []  # both failed in that step
    assert client.summaries[0].finish_reasons == ("error", "abort")


ENDLESS = {"max_tokens": 400, "n": 3, "ignore_eos": True}


@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
@pytest.mark.parametrize("fields", [{"logprobs": 4}, {"logprobs": True, "top_logprobs": 4, "chat": True}])
def test_a_whole_reply_is_bounded(dialect: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_REPLY_BYTES", 20_000)
    fields = dict(fields)

    async def work() -> None:
        client = Client(FakeEngine("x" * 400), dialect)
        ask = client.chat if fields.pop("chat", False) else client.complete
        answer = await ask(**ENDLESS, **fields)
        assert (answer.status, answer.json["error"]["code"]) == (400, "reply_too_long")
        assert "max_tokens" in answer.json["error"]["message"]
        assert len(answer.body) < 1000
        assert sorted(client.engine.aborted) == [0, 1, 2]
        assert len(client.engine.seqs[0].output_ids) < 20
        assert (client.summaries[0].status, client.summaries[0].finish_reasons) == (400, ("error",) * 3)
        assert (await client.complete(**ENDLESS)).status == 200  # text alone is small

    run(work())


def test_what_a_whole_reply_is_made_of_is_kept_no_longer_than_it_is_needed() -> None:
    delta = Delta(0, "x", sampled=[Sampled(1)] * 9, end_token=[Sampled(2)])
    for keeps, num_kept in ((False, 0), (True, 9)):
        reply = Reply(0, keeps)
        reply.add(delta)
        assert (reply.text, len(reply.sampled), len(reply.end_token)) == ("x", num_kept, num_kept // 9)


@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
@pytest.mark.parametrize("large", [True, False])
def test_a_large_reply_is_encoded_in_a_thread(dialect: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    class Watched(JSONResponse):
        def __init__(self, *args: Any) -> None:
            threads.append(threading.get_ident())
            super().__init__(*args)

    monkeypatch.setattr(replies, "JSONResponse", Watched)
    monkeypatch.setattr(replies, "LARGE_REPLY_BYTES", 20_000 if large else 2_000_000)
    answer = complete(FakeEngine("x" * 400), dialect, **ENDLESS, logprobs=1)
    assert [len(choice["text"]) for choice in answer.json["choices"]] == [400] * 3
    assert (threads != [threading.get_ident()]) == large


class BrokenParser:
    def __init__(self, tokenizer: Any) -> None: ...

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        if text == "l":
            raise ValueError("secret path /home/x")
        return "", text


@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
def test_a_parser_that_breaks_fails_its_request_alone(dialect: str, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        client = Client(FakeEngine("Hello", pace=0.001), dialect, reasoning_parser=BrokenParser)
        events = (await client.chat(stream=True)).events
        assert "The server failed on this request." in str(events[-1])
        assert client.engine.aborted == [0]
        whole = await client.chat()
        assert whole.status == 500
        assert "secret" not in str(events) + str(whole.json)
        assert "secret" in caplog.text
        assert (await client.complete()).status == 200

    run(work())


def test_a_stream_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_REPLY_BYTES", 2000)
    client = Client(FakeEngine("x" * 400))
    events = run(client.complete(max_tokens=400, stream=True)).events
    assert len(events) < 12
    assert events[-1]["error_info"]["code"] == 500
    assert client.engine.aborted == [0]
    assert (client.summaries[0].status, client.summaries[0].finish_reasons) == (500, ("error",))


@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
@pytest.mark.parametrize(
    ("engine", "parser", "status", "reasons"),
    [
        (lambda: FakeEngine("Hello", fail_at=2), None, 500, ("error", "abort")),
        (lambda: FakeEngine("Hello", fail_at=2, error=WAITED), None, 503, ("error", "abort")),
        (lambda: FakeEngine("Hello", pace=0.001), BrokenParser, 500, ("error", "abort")),
        (lambda: FakeEngine("Hello"), None, 200, ("stop", "stop")),
    ],
    ids=["engine", "overload", "parser", "well"],
)
def test_a_stream_that_fails_is_counted_as_failed(
    dialect: str, engine: Any, parser: Any, status: int, reasons: tuple[str, ...], caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "blade.access")

    async def work() -> str:
        client = Client(engine(), dialect, reasoning_parser=parser, options={"access_log": True})
        answer = await client.chat(stream=True, n=2)
        assert answer.status == 200  # the head
        assert (client.summaries[0].status, client.summaries[0].finish_reasons) == (status, reasons)
        return (await client.request("GET", "/metrics")).body.decode()

    text = run(work())
    assert f'blade_http_requests_total{{endpoint="/v1/chat/completions",status="{status}"}} 1.0' in text
    for reason in reasons:
        assert f'finish_reason="{reason}"}} {float(reasons.count(reason))}' in text
    assert f"'/v1/chat/completions' {status} " in caplog.text


def test_a_stream_of_a_plugin_that_breaks_off_is_counted_as_failed() -> None:
    async def frames() -> Any:
        yield b"data: 1\n\n"
        raise ZeroDivisionError

    async def handler(server: Any, request: Any) -> EventStream:
        return EventStream(frames())

    async def work() -> str:
        client = Client(routes={"GET /mine": handler})
        assert (await client.request("GET", "/mine")).body == b"data: 1\n\n"
        return (await client.request("GET", "/metrics")).body.decode()

    assert 'blade_http_requests_total{endpoint="/mine",status="500"} 1.0' in run(work())


def test_an_observer_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def observe(summary: Any) -> None:
        raise ZeroDivisionError

    assert run(Client(request_finished=observe).complete()).status == 200
    assert "ZeroDivisionError" in caplog.text


def test_the_summary_says_what_happened() -> None:
    client = Client(FakeEngine("Hi", num_cached=2))
    run(client.complete(n=2, headers={"x-request-id": "r1"}))
    (summary,) = client.summaries
    assert (summary.request_id, summary.endpoint, summary.model) == ("r1", "/v1/completions", "tiny")
    assert (summary.num_choices, summary.prompt_tokens, summary.cached_tokens) == (2, 3, 2)
    assert (summary.completion_tokens, summary.finish_reasons, summary.status) == (6, ("stop", "stop"), 200)
    assert summary.queue_seconds == 0
    assert summary.first_token_seconds is not None
    assert 0 < summary.first_token_seconds <= summary.total_seconds


@pytest.mark.parametrize("tokens_per_step", range(1, 9))
def test_a_stop_string_ends_a_choice_where_it_would_without_drafts(tokens_per_step: int) -> None:
    """A step may bring tokens that come after a stop string, and the stop token as well."""
    engine = FakeEngine("a.bcde.f", tokens_per_step=tokens_per_step)
    answer = complete(engine, "openai", stop=["de"], min_tokens=3, logprobs=1, model="tiny").json
    choice, usage = answer["choices"][0], answer["usage"]
    assert (choice["text"], choice["finish_reason"]) == ("a.bc", "stop")
    assert usage["completion_tokens"] == len(choice["logprobs"]["tokens"]) == 6
    engine = FakeEngine("a.bc.ef", tokens_per_step=tokens_per_step)
    answer = complete(engine, "openai", stop=["."], min_tokens=3, model="tiny").json
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("a.bc", 5)
    details = answer["usage"]["completion_tokens_details"]
    num_steps = -(-5 // tokens_per_step)
    assert sum(details.values()) == num_steps * (tokens_per_step - 1)
    assert details["accepted_prediction_tokens"] <= 5


@pytest.mark.parametrize("stream", [True, False])
def test_what_comes_after_a_stop_string_does_not_count(stream: bool) -> None:
    """Several outputs of one sequence may be waiting at once: those behind its end are not shown, nor counted."""

    async def work() -> None:
        engine = FakeEngine("abcdefgh" * 20, steps_per_look=12)
        client = Client(engine)
        body = {"prompt": "abc", "max_tokens": 150, "n": 3, "stop": ["de"], "ignore_eos": True, "stream": stream}
        answer = await client.post("/v1/completions", body)
        if stream:
            ends = [c["index"] for e in answer.events for c in e["choices"] if c["finish_reason"]]
            assert sorted(ends) == [0, 1, 2]
            usage = answer.events[-1]["usage"]
        else:
            assert [choice["text"] for choice in answer.json["choices"]] == ["abc"] * 3
            usage = answer.json["usage"]
        assert usage["completion_tokens"] == 15

    run(work())
