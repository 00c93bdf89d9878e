"""The built-in routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade.api.adapters import load_adapter, unload_adapter
from blade.api.http import JSONResponse, Response, TextResponse
from blade.api.jobs import chat_job, completion_job
from blade.api.metrics import CONTENT_TYPE
from blade.api.openapi import document
from blade.api.replies import respond

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from blade.api.context import ServerContext
    from blade.api.http import EventStream, HTTPRequest

    Handler = Callable[[ServerContext, HTTPRequest], Awaitable[Response | EventStream]]


class MetricsResponse(Response):
    content_type = CONTENT_TYPE


async def completions(server: ServerContext, http: HTTPRequest) -> Response | EventStream:
    return await respond(server, http, await completion_job(server, http))


async def chat_completions(server: ServerContext, http: HTTPRequest) -> Response | EventStream:
    return await respond(server, http, await chat_job(server, http))


async def list_models(server: ServerContext, http: HTTPRequest) -> Response:
    models = [_model(server), *(_model(server, name) for name in server.adapters)]
    return JSONResponse({"object": "list", "data": models})


async def get_model(server: ServerContext, http: HTTPRequest) -> Response:
    adapter = server.adapter_of(http.path.removeprefix("/v1/models/"))
    return JSONResponse(_model(server, adapter and adapter.name))


def _model(server: ServerContext, adapter: str | None = None) -> dict[str, Any]:
    """`parent`: of an adapter, the model it changes."""
    return {
        "id": adapter or server.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "blade",
        "max_model_len": server.engine.limits.max_context,
        **({"parent": server.model_name} if adapter else {}),
    }


async def hello(server: ServerContext, http: HTTPRequest) -> Response:
    return TextResponse(f"blade {server.version} serves {server.model_name}\n")


async def health(server: ServerContext, http: HTTPRequest) -> Response:
    """200 only while the engine is idle or makes progress; else the log says what is the matter."""
    if server.engine.healthy():
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unhealthy"}, status=503)


async def ping(server: ServerContext, http: HTTPRequest) -> Response:
    return TextResponse("pong\n")


async def version(server: ServerContext, http: HTTPRequest) -> Response:
    return JSONResponse({"version": server.version})


async def metrics(server: ServerContext, http: HTTPRequest) -> Response:
    return MetricsResponse(server.metrics.render(server.engine.stats(), server.engine.healthy()))


async def openapi(server: ServerContext, http: HTTPRequest) -> Response:
    return JSONResponse(document(server, [*ROUTES, *server.routes]))


ROUTES: Mapping[str, Handler] = {
    "POST /v1/completions": completions,
    "POST /v1/chat/completions": chat_completions,
    "GET /v1/models": list_models,
    "GET /v1/models/*": get_model,
    "POST /v1/load_lora_adapter": load_adapter,
    "POST /v1/unload_lora_adapter": unload_adapter,
    "GET /": hello,
    "GET /health": health,
    "GET /ping": ping,
    "GET /version": version,
    "GET /metrics": metrics,
    "GET /metric": metrics,
    "GET /openapi.json": openapi,
}
