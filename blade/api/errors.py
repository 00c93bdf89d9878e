"""What a client learns of an error: status, headers and a sentence from a closed set, never an exception's own text."""

from __future__ import annotations

from dataclasses import dataclass, field

from blade.api.http import Headers, HTTPError
from blade.errors import BladeError, Overloaded, RequestError

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(slots=True, frozen=True)
class Failure:
    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Headers = field(default_factory=list)

    @property
    def type(self) -> str:
        """OpenAI's name for the kind of error."""
        return TYPES.get(self.status, TYPES[400] if self.status < 500 else "server_error")


def failure_of(error: Exception) -> Failure:
    """BladeErrors are written for their readers; of anything else a client learns only that it happened."""
    if isinstance(error, HTTPError):
        return Failure(error.status, _text(error), error.code, error.param, error.headers)
    if isinstance(error, RequestError):
        return Failure(400, _text(error), param=error.param)
    if isinstance(error, Overloaded):
        code = "queue_full" if error.status == 429 else "overloaded"
        return Failure(error.status, _text(error), code, headers=[("retry-after", str(error.retry_after))])
    return Failure(500, "The server failed on this request.", code="internal_error")


def _text(error: BladeError) -> str:
    return f"{error.message} {error.remedy}".strip()
