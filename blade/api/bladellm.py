"""The dialect of BladeLLM's quick start: "" while running, cumulative usage in every chunk, `error_info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar
from uuid import uuid4

import msgspec
from msgspec import UNSET, Struct, UnsetType

from blade.api.logprobs import BladeToken, blade_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blade.api.choice import Delta, Reply
    from blade.api.errors import Failure
    from blade.api.generation import Usage
    from blade.api.jobs import Job
    from blade.contracts import Tokenizer
    from blade.types import Sampled


C = TypeVar("C")


class BladeUsage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorInfo(Struct):
    code: int
    message: str


class BladeLogprobs(Struct):
    content: list[BladeToken]


class BladeMessage(Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET


class BladeCompletionChoice(Struct):
    finish_reason: str
    index: int
    logprobs: BladeLogprobs | None
    text: str


class BladeChatChoice(Struct):
    finish_reason: str
    index: int
    logprobs: BladeLogprobs | None
    message: BladeMessage


class BladeDeltaChoice(Struct):
    finish_reason: str
    index: int
    logprobs: BladeLogprobs | None
    delta: BladeMessage


class BladeResponse(Struct, Generic[C], kw_only=True):
    """A whole response or a chunk, of either endpoint."""

    id: str
    choices: list[C]
    object: str
    usage: BladeUsage
    error_info: ErrorInfo | None = None
    model: str = ""


class BladeLLM:
    """Frames one job (the other dialect is blade.api.openai.OpenAI)."""

    schemas: ClassVar[dict[str, tuple[Any, Any]]] = {
        "/v1/completions": (BladeResponse[BladeCompletionChoice], BladeResponse[BladeCompletionChoice]),
        "/v1/chat/completions": (BladeResponse[BladeChatChoice], BladeResponse[BladeDeltaChoice]),
    }

    def __init__(self, job: Job, model_name: str, tokenizer: Tokenizer, usage: Usage) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._usage = usage
        self._begun: set[int] = set()  # choices whose role has been sent
        self._encoder = msgspec.json.Encoder()

    @staticmethod
    def new_id(path: str) -> str:
        return str(uuid4())

    @staticmethod
    def error(failure: Failure) -> Any:
        """OpenAI's object, so that its clients read it; 4xx texts begin as BladeLLM's do."""
        message = f"Invalid request: {failure.message}" if failure.status == 400 else failure.message
        return {
            "error": {"message": message, "type": failure.type, "param": failure.param, "code": failure.code},
            "error_info": {"code": failure.status, "message": message},
        }

    def frame(self, delta: Delta, failure: Failure | None = None) -> bytes:
        """One chunk per engine step and choice, also when it brought no text yet: usage goes on counting."""
        reason = delta.finish_reason or ""
        logprobs = self._logprobs(delta.sampled + delta.end_token)
        error = ErrorInfo(failure.status, failure.message) if failure else None
        if not self._job.chat:
            choice = BladeCompletionChoice(reason, delta.index, logprobs, delta.text)
            return self._event("text_completion", choice, error)
        role = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role = self._event(
                "chat.completion.chunk",
                BladeDeltaChoice("", delta.index, None, BladeMessage(role="assistant", content="")),
            )
        message = BladeMessage(
            content=delta.text, reasoning_content=delta.reasoning or UNSET, tool_calls=delta.tool_calls or UNSET
        )
        return role + self._event(
            "chat.completion.chunk", BladeDeltaChoice(reason, delta.index, logprobs, message), error
        )

    def end(self) -> bytes:
        return b"data: [DONE]\n\n"

    def failure(self, failure: Failure) -> bytes:
        """The last chunk of a stream that fails for no one choice's sake."""
        error = ErrorInfo(failure.status, failure.message)
        return b"data: " + self._encoder.encode(self._response(self._object(chunk=True), [], error)) + b"\n\n"

    def reply(self, replies: Iterable[Reply], failure: Failure | None = None) -> Any:
        error = ErrorInfo(failure.status, failure.message) if failure else None
        made = self._chat_choice if self._job.chat else self._completion_choice
        # Each is encoded by itself, so that only one choice's log-probabilities are there as objects at a time.
        choices = [msgspec.Raw(self._encoder.encode(made(reply))) for reply in replies]
        return self._response(self._object(chunk=False), choices, error)

    def _event(self, kind: str, choice: Any, error: ErrorInfo | None = None) -> bytes:
        return b"data: " + self._encoder.encode(self._response(kind, [choice], error)) + b"\n\n"

    def _response(self, kind: str, choices: list[Any], error: ErrorInfo | None) -> BladeResponse[Any]:
        usage = self._usage
        return BladeResponse(
            id=self._job.id,
            choices=choices,
            object=kind,
            usage=BladeUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens),
            error_info=error,
            model=self._job.model,
        )

    def _object(self, chunk: bool) -> str:
        if not self._job.chat:
            return "text_completion"
        return "chat.completion.chunk" if chunk else "chat.completion"

    def _completion_choice(self, reply: Reply) -> BladeCompletionChoice:
        logprobs = self._logprobs(reply.sampled + reply.end_token)
        return BladeCompletionChoice(reply.finish_reason or "", reply.index, logprobs, reply.text)

    def _chat_choice(self, reply: Reply) -> BladeChatChoice:
        message = BladeMessage(
            role="assistant",
            content=reply.text,
            reasoning_content=reply.reasoning or UNSET,
            tool_calls=reply.tool_calls or UNSET,
        )
        logprobs = self._logprobs(reply.sampled + reply.end_token)
        return BladeChatChoice(reply.finish_reason or "", reply.index, logprobs, message)

    def _logprobs(self, sampled: list[Sampled]) -> BladeLogprobs | None:
        return BladeLogprobs(blade_tokens(sampled, self._tokenizer)) if self._job.logprobs and sampled else None
