"""From "METHOD /path" to a handler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade.api.http import HTTPError
from blade.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Handler = Callable[..., Awaitable[Any]]


class Router:
    """A table of exact paths, and of prefixes where a path ends in `/*`."""

    def __init__(self, routes: Mapping[str, Handler]) -> None:
        self._paths: dict[str, dict[str, Handler]] = {}
        for route, handler in routes.items():
            method, _, path = route.partition(" ")
            if not method.isupper() or not path.startswith("/"):
                raise ConfigError(f"The route {route!r} is malformed.", 'It has to look like "GET /path".')
            self._paths.setdefault(path, {})[method] = handler
        prefixes = [path[:-1] for path in self._paths if path.endswith("/*")]
        self._prefixes = sorted(prefixes, key=len, reverse=True)

    def handler(self, method: str, pattern: str | None) -> Handler:
        """Of a registered path; raises HTTPError 404 where it is None, or 405 with the methods there are."""
        if pattern is None:
            raise HTTPError(404, "There is no such path.", code="not_found")
        methods = self._paths[pattern]
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            allow = ", ".join(sorted(methods))
            raise HTTPError(405, f"This path takes {allow}.", code="method_not_allowed", headers=[("allow", allow)])
        return handler

    def pattern(self, path: str) -> str | None:
        """The registered path that `path` falls under, the longest where there are several; None: there is none."""
        if path in self._paths:
            return path
        below = next((prefix for prefix in self._prefixes if path.startswith(prefix) and path != prefix), None)
        return None if below is None else below + "*"
