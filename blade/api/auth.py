"""Who may ask: API keys, deny by default."""

from __future__ import annotations

import hmac
from hashlib import blake2b
from typing import TYPE_CHECKING

from blade.api.http import HTTPError

if TYPE_CHECKING:
    from collections.abc import Iterable

PUBLIC_PATHS = frozenset({"/health", "/ping"})


class ApiKeys:
    """The keys the server accepts; with none, everybody is let in (a public bind then needs `--insecure`)."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def authorize(self, path: str, authorization: str | None) -> bytes:
        """The caller's tenant: a digest of its key, b"" without one. Raises HTTPError 401.

        `path` is compared whole. granian hands it over percent-decoded, without resolving `..` or `//` in it, and the
        router compares the same string, so that none is public here and another route there. Every key is compared,
        each in constant time, so that the time taken tells neither how much of a key was right nor which one it was.
        `Authorization` holds the bare key, as BladeLLM's clients send it, or `Bearer KEY`.
        """
        if not self._digests or path in PUBLIC_PATHS:
            return b""
        given = _digest(_token(authorization or ""))
        matches = [digest for digest in self._digests if hmac.compare_digest(digest, given)]
        if not matches:
            raise HTTPError(
                401,
                "The API key is missing or wrong. Send it in the Authorization header.",
                code="invalid_api_key",
                headers=[("www-authenticate", "Bearer")],
            )
        return matches[0]


def _token(authorization: str) -> str:
    scheme, _, rest = authorization.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else authorization.strip()


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32).digest()
