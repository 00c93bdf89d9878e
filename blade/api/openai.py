"""OpenAI's dialect, strictly: null finish reasons, `created`, usage in a stream only when asked for.

OpenAI has no finish reason for a generation that the server cut short (a drain at its deadline): "length" is used, as
it is the one that tells a client the text is incomplete.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar
from uuid import uuid4

import msgspec
from msgspec import UNSET, Struct, UnsetType

from blade.api.logprobs import LegacyLogprobs, Offsets, Token, legacy, tokens

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blade.api.choice import Delta, Reply
    from blade.api.errors import Failure
    from blade.api.generation import Usage
    from blade.api.jobs import Job
    from blade.contracts import Tokenizer
    from blade.types import Sampled


C = TypeVar("C")


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    """Of speculative decoding: drafted tokens that are in the completion, and ones that are not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class OpenAIUsage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ChatLogprobs(Struct):
    content: list[Token]
    refusal: None = None


class ChatMessage(Struct, kw_only=True):
    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET


class ChatDelta(Struct, kw_only=True, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET


class CompletionChoice(Struct):
    text: str
    index: int
    logprobs: LegacyLogprobs | None
    finish_reason: str | None


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class DeltaChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class OpenAIResponse(Struct, Generic[C], kw_only=True):
    """A whole response or a chunk, of either endpoint."""

    id: str
    object: str
    created: int  # seconds since the epoch
    model: str
    choices: list[C]
    usage: OpenAIUsage | UnsetType | None = UNSET


class OpenAI:
    """Frames one job (the other dialect is blade.api.bladellm.BladeLLM)."""

    schemas: ClassVar[dict[str, tuple[Any, Any]]] = {
        "/v1/completions": (OpenAIResponse[CompletionChoice], OpenAIResponse[CompletionChoice]),
        "/v1/chat/completions": (OpenAIResponse[ChatChoice], OpenAIResponse[DeltaChoice]),
    }

    def __init__(self, job: Job, model_name: str, tokenizer: Tokenizer, usage: Usage) -> None:
        self._job = job
        self._model_name = model_name
        self._tokenizer = tokenizer
        self._usage = usage
        self._created = int(time.time())
        self._begun: set[int] = set()  # choices whose role has been sent
        self._offsets = [Offsets() for _ in job.seqs]  # of logprob tokens, by choice
        self._encoder = msgspec.json.Encoder()

    @staticmethod
    def new_id(path: str) -> str:
        return f"{'chatcmpl' if 'chat' in path else 'cmpl'}-{uuid4().hex}"

    @staticmethod
    def error(failure: Failure) -> Any:
        return {
            "error": {"message": failure.message, "type": failure.type, "param": failure.param, "code": failure.code}
        }

    def frame(self, delta: Delta, failure: Failure | None = None) -> bytes:
        """The chunk of one engine step and choice, or nothing where it brought nothing to show."""
        if failure is not None:
            return self.failure(failure)
        return self._chat_frame(delta) if self._job.chat else self._completion_frame(delta)

    def _completion_frame(self, delta: Delta) -> bytes:
        logprobs = self._legacy_logprobs(delta.index, delta.sampled)
        if not delta.has_text and logprobs is None and delta.finish_reason is None:
            return b""
        return self._event([CompletionChoice(delta.text, delta.index, logprobs, _reason(delta.finish_reason))])

    def _chat_frame(self, delta: Delta) -> bytes:
        role = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role = self._event([DeltaChoice(delta.index, ChatDelta(role="assistant", content=""), None, None)])
        logprobs = self._chat_logprobs(delta.sampled)
        if not delta.has_text and logprobs is None and delta.finish_reason is None:
            return role
        message = ChatDelta(
            content=delta.text or UNSET,
            reasoning_content=delta.reasoning or UNSET,
            tool_calls=delta.tool_calls or UNSET,
        )
        return role + self._event([DeltaChoice(delta.index, message, logprobs, _reason(delta.finish_reason))])

    def end(self) -> bytes:
        """With `stream_options.include_usage`, one more chunk that has usage and no choices; then the end."""
        usage = b""
        if self._job.include_usage:
            usage = self._event([], self._full_usage())
        return usage + b"data: [DONE]\n\n"

    def failure(self, failure: Failure) -> bytes:
        return b"data: " + self._encoder.encode(self.error(failure)) + b"\n\n"

    def reply(self, replies: Iterable[Reply], failure: Failure | None = None) -> Any:
        if failure is not None:
            return self.error(failure)
        made = self._chat_choice if self._job.chat else self._completion_choice
        # Each is encoded by itself, so that only one choice's log-probabilities are there as objects at a time.
        choices = [msgspec.Raw(self._encoder.encode(made(reply))) for reply in replies]
        return self._response("chat.completion" if self._job.chat else "text_completion", choices, self._full_usage())

    def _event(self, choices: list[Any], usage: OpenAIUsage | None = None) -> bytes:
        kind = "chat.completion.chunk" if self._job.chat else "text_completion"
        shown = usage if self._job.include_usage else UNSET
        return b"data: " + self._encoder.encode(self._response(kind, choices, shown)) + b"\n\n"

    def _response(self, kind: str, choices: list[Any], usage: OpenAIUsage | UnsetType | None) -> OpenAIResponse[Any]:
        return OpenAIResponse(
            id=self._job.id,
            object=kind,
            created=self._created,
            model=self._model_name,
            choices=choices,
            usage=usage,
        )

    def _full_usage(self) -> OpenAIUsage:
        usage = self._usage
        return OpenAIUsage(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            PromptTokensDetails(usage.cached_tokens),
            CompletionTokensDetails(usage.accepted_tokens, usage.rejected_tokens),
        )

    def _completion_choice(self, reply: Reply) -> CompletionChoice:
        logprobs = self._legacy_logprobs(reply.index, reply.sampled)
        return CompletionChoice(reply.text, reply.index, logprobs, _reason(reply.finish_reason))

    def _chat_choice(self, reply: Reply) -> ChatChoice:
        message = ChatMessage(
            content=reply.text or (None if reply.tool_calls else ""),
            reasoning_content=reply.reasoning or UNSET,
            tool_calls=reply.tool_calls or UNSET,
        )
        return ChatChoice(reply.index, message, self._chat_logprobs(reply.sampled), _reason(reply.finish_reason))

    def _chat_logprobs(self, sampled: list[Sampled]) -> ChatLogprobs | None:
        return ChatLogprobs(tokens(sampled, self._tokenizer)) if self._job.logprobs and sampled else None

    def _legacy_logprobs(self, index: int, sampled: list[Sampled]) -> LegacyLogprobs | None:
        if not self._job.logprobs or not sampled:
            return None
        return legacy(sampled, self._tokenizer, self._offsets[index])


def _reason(reason: str | None) -> str | None:
    return "length" if reason == "abort" else reason
