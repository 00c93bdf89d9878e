"""What the server says of itself."""

import re
from typing import Any

import pytest

from .fakes import Client, FakeEngine, run


def sample(text: str, name: str) -> float:
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert match, name
    return float(match[1])


def test_metrics_count_what_happened() -> None:
    async def work() -> str:
        client = Client(FakeEngine("Hello", pace=0.002))
        await client.complete(n=2)
        await client.chat(stream=True)
        await client.complete(temperature=-1)
        await client.request("GET", "/nowhere/at/all")
        answer = await client.request("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert (await client.request("GET", "/metric")).status == 200
        return answer.body.decode()

    text = run(work())
    requests = 'blade_http_requests_total{endpoint="%s",status="%d"}'
    assert sample(text, requests % ("/v1/completions", 200)) == 1
    assert sample(text, requests % ("/v1/completions", 400)) == 1
    assert sample(text, requests % ("/v1/chat/completions", 200)) == 1
    assert sample(text, requests % ("other", 404)) == 1
    assert sample(text, 'blade_choices_total{endpoint="/v1/completions",finish_reason="stop"}') == 2
    assert sample(text, "blade_request_seconds_count") == 2
    assert sample(text, "blade_time_to_first_token_seconds_count") == 2
    assert sample(text, "blade_queue_seconds_count") == 2
    assert sample(text, "blade_inter_token_seconds_count") == 3 * 5  # 3 choices, 5 tokens after each first
    assert sample(text, "blade_inter_token_seconds_sum") >= 15 * 0.002
    assert sample(text, 'blade_inter_token_seconds_bucket{le="0.001"}') == 0
    assert sample(text, 'blade_inter_token_seconds_bucket{le="+Inf"}') == 15
    assert sample(text, "blade_engine_sequences_running") == 3
    assert sample(text, "blade_kv_blocks") == 10
    assert sample(text, "blade_kv_blocks_free") == 7
    assert sample(text, "blade_generated_tokens_total") == 42
    assert sample(text, "blade_engine_healthy") == 1


def test_every_number_of_the_engine_is_there() -> None:
    from dataclasses import fields

    from blade.api.metrics import DRAFTER_COUNTERS, DRAFTER_GAUGES, ENGINE_COUNTERS, ENGINE_GAUGES
    from blade.types import DrafterStats, EngineStats

    shown = ENGINE_GAUGES.keys() | ENGINE_COUNTERS.keys() | {"drafters"}
    assert {field.name for field in fields(EngineStats)} == shown
    assert {field.name for field in fields(DrafterStats)} == DRAFTER_COUNTERS.keys() | DRAFTER_GAUGES.keys() | {"name"}


def test_each_drafter_has_its_own_counts() -> None:
    from blade.api.metrics import Metrics
    from blade.types import DrafterStats, EngineStats

    stats = EngineStats(
        drafters=(DrafterStats("suffix", tokens_proposed=7), DrafterStats("model", seconds=0.5, enabled=False))
    )
    text = Metrics().render(stats, True).decode()
    assert 'blade_drafter_tokens_proposed_total{drafter="suffix"} 7.0' in text
    assert 'blade_drafter_seconds_total{drafter="model"} 0.5' in text
    assert 'blade_drafter_enabled{drafter="suffix"} 1.0' in text
    assert 'blade_drafter_enabled{drafter="model"} 0.0' in text


def test_health_follows_the_engine() -> None:
    engine = FakeEngine()
    client = Client(engine)
    assert run(client.request("GET", "/health")).json == {"status": "ok"}
    engine.is_healthy = False
    unhealthy = run(client.request("GET", "/health"))
    assert (unhealthy.status, unhealthy.json) == (503, {"status": "unhealthy"})
    assert run(client.request("GET", "/ping")).status == 200


def test_the_small_routes() -> None:
    async def work() -> None:
        client = Client()
        assert (await client.request("GET", "/version")).json == {"version": "1.2.3"}
        assert b"tiny" in (await client.request("GET", "/")).body
        models = (await client.request("GET", "/v1/models")).json
        assert models["object"] == "list"
        (model,) = models["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 512)
        assert (await client.request("GET", "/v1/models/tiny")).json == model
        assert (await client.request("GET", "/v1/models/a/b")).status == 404

    run(work())


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*(references(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*map(references, value))
    return set()


@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
def test_the_description_is_complete(dialect: str) -> None:
    async def mine(server: Any, request: Any) -> Any: ...

    client = Client(dialect=dialect, routes={"GET /mine": mine})
    document = run(client.request("GET", "/openapi.json")).json
    assert document["openapi"].startswith("3.1")
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models/{name}", "/health", "/mine"} <= document[
        "paths"
    ].keys()
    schemas = document["components"]["schemas"]
    assert references(document) == {f"#/components/schemas/{name}" for name in schemas}
    completion = schemas["CompletionRequest"]
    assert completion["required"] == ["prompt"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in completion["properties"]["temperature"]["anyOf"]
    assert "security" not in document["paths"]["/health"]["get"]
    assert document["paths"]["/mine"]["get"]["security"] == [{"key": []}]
