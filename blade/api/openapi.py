"""The OpenAPI 3.1 description, made from the structs that do the decoding and encoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from blade.api.auth import PUBLIC_PATHS
from blade.api.dialects import DIALECTS
from blade.api.params import RANGES
from blade.api.wire import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blade.api.context import ServerContext

BODIES = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
REF = "#/components/schemas/{name}"


def document(server: ServerContext, routes: Iterable[str]) -> dict[str, Any]:
    """`routes` are "METHOD /path", plugins' included."""
    schemas, components = _schemas(DIALECTS[server.options.dialect].schemas)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        method, _, path = route.partition(" ")
        paths.setdefault(path.replace("*", "{name}"), {})[method.lower()] = _operation(path, schemas.get(path))
    return {
        "openapi": "3.1.0",
        "info": {"title": "blade", "version": server.version},
        "servers": [{"url": server.url}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(responses: dict[str, tuple[Any, Any]]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """(path -> references to its request, response and chunk; the components they refer to)."""
    types = [kind for path, body in BODIES.items() for kind in (body, *responses[path])]
    references, components = msgspec.json.schema_components(types, ref_template=REF)
    for body in BODIES.values():
        _add_ranges(components[body.__name__]["properties"])
    of = dict(zip(types, references, strict=True))
    return {path: [of[body], *(of[kind] for kind in responses[path])] for path, body in BODIES.items()}, components


def _operation(path: str, schemas: list[Any] | None) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "OK"}
    operation: dict[str, Any] = {"responses": {"200": ok}}
    if schemas is not None:
        request, response, chunk = ({"schema": schema} for schema in schemas)
        operation["requestBody"] = {"required": True, "content": {"application/json": request}}
        ok["content"] = {"application/json": response, "text/event-stream": chunk}
    if path.endswith("*"):
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if path not in PUBLIC_PATHS:
        operation["security"] = [{"key": []}]
    return operation


def _add_ranges(properties: dict[str, Any]) -> None:
    """The bounds that blade.api.params checks, beside those the structs carry."""
    for name, (low, high) in RANGES.items():
        for option in properties[name]["anyOf"]:
            if option.get("type") == "number":
                option |= {"minimum": low, "maximum": high}
