"""The few errors blade raises on purpose. Each is one sentence for a person and, where there is one, a remedy."""

from __future__ import annotations

LONGEST = 800  # characters of a sentence


class BladeError(Exception):
    """Base of every error whose text was written for the user to read."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class ConfigError(BladeError):
    """The configuration cannot be honoured: the start stops with exit status 2."""


class PluginError(ConfigError):
    """A plugin is unknown, broken, or in conflict with another one."""


class CheckpointError(ConfigError):
    """Model files are missing, truncated, malformed, or of a kind blade does not serve. What is quoted of them comes
    from anywhere, and is shown as `shown` does."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(shown(message), shown(remedy))


def shown(text: str) -> str:
    """For a terminal: what cannot be printed is escaped, and of what is too long the middle left out."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class RequestError(BladeError):
    """One request cannot be honoured (HTTP 400). `param` is the field's path in the body: ``messages[0].role``."""

    def __init__(self, message: str, param: str | None = None, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.param = param


class Overloaded(BladeError):
    """No room for the request now: HTTP 429 when the queue is full, 503 when it waited too long or blade stops."""

    def __init__(self, message: str, status: int, retry_after: int) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after  # seconds
