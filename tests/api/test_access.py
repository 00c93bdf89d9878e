"""Who may come in, and where the paths lead."""

import hmac
import logging
import time
from typing import Any

import pytest

from blade.api.auth import ApiKeys
from blade.api.http import HTTPError, JSONResponse
from blade.api.router import Router
from blade.errors import ConfigError

from .fakes import Client, run

KEYS = ("first-key", "second-key")


@pytest.mark.parametrize("authorization", ["first-key", "Bearer second-key", "bearer  first-key ", "second-key"])
def test_a_key_opens_with_and_without_bearer(authorization: str) -> None:
    answer = run(Client(api_keys=KEYS).complete(headers={"authorization": authorization}))
    assert answer.status == 200


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "wrong", "first-ke", "Basic first-key", "é"])
def test_without_a_key_all_is_shut(authorization: str | None) -> None:
    async def work() -> None:
        client = Client(api_keys=KEYS)
        headers = {} if authorization is None else {"authorization": authorization}
        for method, path in [
            ("POST", "/v1/completions"),
            ("GET", "/"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/nowhere"),
            ("GET", "/health/"),
            ("GET", "//health"),
            ("GET", "/v1/../health"),
            ("GET", "/HEALTH"),
        ]:
            answer = await client.request(method, path, headers=headers)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            assert answer.json["error"]["code"] == "invalid_api_key"
            assert "key" not in answer.body.decode().replace("API key", "").replace("api_key", "")
        assert client.engine.seqs == []

    run(work())


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_is_public(path: str) -> None:
    assert run(Client(api_keys=KEYS).request("GET", path)).status == 200


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    compare = hmac.compare_digest

    def watched(a: bytes, b: bytes) -> bool:
        compared.append(len(b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    keys = ApiKeys(KEYS)
    assert keys.authorize("/", "first-key") != keys.authorize("/", "second-key")
    with pytest.raises(HTTPError):
        keys.authorize("/", "x")
    assert compared == [32] * 6


def test_tenants_share_no_prefixes() -> None:
    async def work() -> None:
        client = Client(api_keys=KEYS)
        for key in ("first-key", "second-key", "Bearer first-key"):
            await client.complete(headers={"authorization": key})
        first, second, third = (seq.namespace for seq in client.engine.seqs)
        assert first == third != second

    run(work())


def test_unknown_paths_and_methods() -> None:
    async def work() -> None:
        client = Client()
        missing = await client.request("GET", "/v1/nothing")
        assert (missing.status, missing.json["error"]["code"]) == (404, "not_found")
        wrong = await client.request("GET", "/v1/completions")
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
        assert (await client.request("HEAD", "/health")).status == 200

    run(work())


def test_a_prefix_route_takes_what_is_below_it() -> None:
    router = Router({"GET /a/*": run, "GET /a": run, "GET /a/b/*": run})
    assert router.pattern("/a/c/d") == "/a/*"
    assert router.pattern("/a/b") == "/a/*"
    assert router.pattern("/a/b/c") == "/a/b/*"
    assert router.pattern("/a//") == "/a/*"
    assert router.pattern("/a") == "/a"
    assert router.pattern("/a/") is None
    assert router.pattern("/ab") is None


def test_a_path_of_slashes_takes_no_longer_than_another() -> None:
    router = Router({"GET /a/*": run})
    started = time.perf_counter()
    assert router.pattern("/" * 60_000) is None
    assert time.perf_counter() - started < 0.05  # what is quadratic in the slashes takes seconds


def test_a_route_is_looked_for_once_and_only_for_those_who_may_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[str] = []
    pattern = Router.pattern

    def watched(self: Router, path: str) -> str | None:
        looked_for.append(path)
        return pattern(self, path)

    monkeypatch.setattr(Router, "pattern", watched)

    async def work() -> str:
        client = Client(api_keys=KEYS)
        assert (await client.request("GET", "/version")).status == 401
        assert looked_for == []
        answer = await client.request("GET", "/version", headers={"authorization": KEYS[0]})
        assert (answer.status, looked_for) == (200, ["/version"])
        return (await client.request("GET", "/metrics", headers={"authorization": KEYS[0]})).body.decode()

    text = run(work())
    assert 'blade_http_requests_total{endpoint="other",status="401"} 1.0' in text
    assert 'blade_http_requests_total{endpoint="/version",status="200"} 1.0' in text


@pytest.mark.parametrize("route", ["get /x", "GET x", "GET", "/x"])
def test_a_malformed_route_stops_the_start(route: str) -> None:
    with pytest.raises(ConfigError, match="GET /path"):
        Router({route: run})


def test_plugins_add_routes_and_cannot_take_ours() -> None:
    async def handler(server: Any, request: Any) -> JSONResponse:
        return JSONResponse(
            {"model": server.model_name, "query": request.query, "body": len(await request.body())}, 201
        )

    answer = run(Client(routes={"POST /mine": handler}).post("/mine?a=1&b", b"xyz"))
    assert (answer.status, answer.json) == (201, {"model": "tiny", "query": {"a": "1", "b": ""}, "body": 3})
    with pytest.raises(ConfigError, match="built in"):
        Client(routes={"GET /health": handler})


def test_a_route_that_returns_something_else_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(server: Any, request: Any) -> Any:
        return {"a": 1}

    assert run(Client(routes={"GET /mine": handler}).request("GET", "/mine")).status == 500
    assert "returned a dict" in caplog.text


def test_the_access_log_escapes_what_clients_write(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "blade.access")
    run(Client(options={"access_log": True}).request("GET", "/a\nb", headers={"x-request-id": "r1"}))
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    assert "GET '/a\\nb' 404" in message
    assert message.endswith("r1")


def test_a_web_page_may_not_use_a_server_without_a_key() -> None:
    page = {"origin": "http://evil.example"}
    assert run(Client().complete(headers=page)).status == 403
    assert run(Client().complete()).status == 200
    assert run(Client(api_keys=KEYS).complete(headers=page | {"authorization": KEYS[0]})).status == 200
