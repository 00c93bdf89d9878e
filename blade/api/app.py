"""The RSGI application: every request's way in and every error's way out."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING

from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]

from blade.api.auth import ApiKeys
from blade.api.dialects import DIALECTS
from blade.api.errors import failure_of
from blade.api.generation import CLIENT_GONE
from blade.api.http import ClientGone, EventStream, HTTPError, HTTPRequest, JSONResponse, Response
from blade.api.router import Router
from blade.api.routes import ROUTES
from blade.errors import BladeError, ConfigError

if TYPE_CHECKING:
    from granian.rsgi import HTTPProtocol, Scope  # type: ignore[attr-defined]

    from blade.api.context import ServerContext

log = logging.getLogger("blade.api")
access_log = logging.getLogger("blade.access")

ID_HEADERS = ("x-dashscope-requestid", "x-request-id")
MAX_ID_LENGTH = 128
_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._:/+=@-]")


class App:
    """Authorises, routes, answers and logs. Whatever a handler raises becomes an error response of the dialect."""

    def __init__(self, server: ServerContext) -> None:
        if taken := ROUTES.keys() & server.routes.keys():
            raise ConfigError(f"A plugin registers the route {min(taken)!r}, which is built in.")
        self.server = server
        self._dialect = DIALECTS[server.options.dialect]
        self._keys = ApiKeys(server.api_keys)
        self._router = Router({**ROUTES, **server.routes})

    async def __rsgi__(self, scope: Scope, proto: HTTPProtocol) -> None:
        started = time.perf_counter()
        http = HTTPRequest(scope, proto, self.server.options)
        http.id = _request_id(http.headers) or self._dialect.new_id(http.path)
        status = 500
        try:
            response = await self._respond(http)
            response.headers.append(("x-request-id", http.id))
            status = await response.send(proto)
        except (ClientGone, ProtocolClosed):
            status = CLIENT_GONE
        except Exception:  # only a stream can still fail here; its response ends without a last event
            log.exception("request %s to %r broke off", http.id, http.path)
        finally:
            self._record(scope, http, status, time.perf_counter() - started)

    async def _respond(self, http: HTTPRequest) -> Response | EventStream:
        try:
            http.tenant = self._keys.authorize(http.path, http.headers.get("authorization"))
            if "origin" in http.headers and not self.server.api_keys:
                raise HTTPError(403, "Without an API key, requests of web pages are refused: any page could send them.")
            http.pattern = self._router.pattern(http.path)
            handler = self._router.handler(http.method, http.pattern)
            response = await handler(self.server, http)
            if not isinstance(response, Response | EventStream):
                raise TypeError(f"the handler of {http.path} returned a {type(response).__name__}")
            return response
        except ClientGone:
            raise
        except Exception as error:
            if not isinstance(error, BladeError):
                log.exception("request %s to %r failed", http.id, http.path)
            failure = failure_of(error)
            return JSONResponse(self._dialect.error(failure), failure.status, failure.headers)

    def _record(self, scope: Scope, http: HTTPRequest, status: int, seconds: float) -> None:
        self.server.metrics.responded(http.pattern or "other", status)
        if self.server.options.access_log:
            # %r escapes what a client may have put into its path.
            access_log.info(
                "%s %s %r %d %.1f ms %s", scope.client, http.method, http.path[:512], status, seconds * 1e3, http.id
            )


def _request_id(headers: dict[str, str]) -> str:
    """The client's own id, without what would not belong into a log or a header."""
    given = next((headers[name] for name in ID_HEADERS if name in headers), "")
    return _NOT_IN_IDS.sub("", given[: 4 * MAX_ID_LENGTH])[:MAX_ID_LENGTH]
