"""Bodies that are too large, too slow, or in pieces; queries that are too long."""

import json
from typing import Any

from .fakes import Client, run
from .rsgi import FakeProto

SMALL = {"options": {"max_body_bytes": 2000, "body_seconds": 0.1}}


def post(body: bytes, headers: dict[str, str] | None = None, chunk_delay: float = 0) -> Any:
    async def work() -> Any:
        client = Client(**SMALL)
        proto = FakeProto(body, chunk_delay)
        answer = await client.request("POST", "/v1/completions", proto=proto, headers=headers)
        assert (await client.complete()).status == 200
        return answer

    return run(work())


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    answer = post(b"", {"content-length": "2001"})
    assert answer.status == 413
    assert "2000 bytes" in answer.json["error"]["message"]


def test_a_body_that_turns_out_too_large_is_dropped() -> None:
    assert post(b"x" * 10_000_000).status == 413
    assert post(b"x" * 2001, {"content-length": "5"}).status == 413


def test_a_length_beyond_all_integers_is_too_large() -> None:
    assert post(b"", {"content-length": "9" * 5000}).status == 413


def test_a_slow_body_times_out() -> None:
    assert post(b"x" * 2000, chunk_delay=0.07).status == 408


def test_a_body_in_pieces_is_put_together() -> None:
    assert post(json.dumps({"prompt": "a", "user": "u" * 200, "x": "y" * 1500}).encode()).status == 200


def test_a_query_of_very_many_fields_is_refused() -> None:
    async def handler(server: Any, request: Any) -> Any:
        return request.query

    answer = run(Client(routes={"GET /q": handler}).request("GET", "/q?" + "&".join(["a"] * 100)))
    assert answer.status == 400


def test_a_body_that_breaks_off_is_not_taken_for_whole() -> None:
    body = json.dumps({"prompt": "abc"}).encode()
    assert post(body, {"content-length": str(len(body))}).status == 200
    answer = post(body, {"content-length": "100"})
    assert answer.status == 400
    assert f"{len(body)} of 100 bytes" in answer.json["error"]["message"]


def test_ambiguous_and_encoded_bodies_are_refused() -> None:
    body = json.dumps({"prompt": "abc"}).encode()
    both = {"content-length": str(len(body)), "transfer-encoding": "chunked"}
    assert post(body, both).status == 400
    assert post(body, {"content-encoding": "gzip"}).status == 415
    assert post(body, {"content-encoding": "identity"}).status == 200
