"""The two ways to write a reply, by the name `--dialect` knows them by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from blade.api.bladellm import BladeLLM
from blade.api.openai import OpenAI

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from blade.api.choice import Delta, Reply
    from blade.api.errors import Failure
    from blade.api.generation import Usage
    from blade.api.jobs import Job
    from blade.contracts import Tokenizer


class Dialect(Protocol):
    """Frames one job; `usage` is the generation's own and counts on."""

    schemas: ClassVar[dict[str, tuple[Any, Any]]]  # path -> types of (its response, its chunks)

    def __init__(self, job: Job, model_name: str, tokenizer: Tokenizer, usage: Usage) -> None: ...

    @staticmethod
    def new_id(path: str) -> str:
        """An id for a request that brought none."""
        ...

    @staticmethod
    def error(failure: Failure) -> Any:
        """The body of an error response."""
        ...

    def frame(self, delta: Delta, failure: Failure | None = None) -> bytes:
        """The server-sent events of one delta; b"" where there is nothing to say."""
        ...

    def failure(self, failure: Failure) -> bytes:
        """The last event of a stream in which something failed."""
        ...

    def end(self) -> bytes:
        """What ends a stream."""
        ...

    def reply(self, replies: Iterable[Reply], failure: Failure | None = None) -> Any:
        """The body of a response that is not a stream."""
        ...


DIALECTS: Mapping[str, type[Dialect]] = {"bladellm": BladeLLM, "openai": OpenAI}
