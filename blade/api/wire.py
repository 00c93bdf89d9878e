"""What clients may send: bounded structs, and how a body becomes one. Unknown fields are ignored, as OpenAI does."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from blade.errors import RequestError

MAX_INT = 2**31 - 1
MAX_PROMPTS = 2048
INT64 = Meta(ge=-(2**63), le=2**63 - 1)

Name = Annotated[str, Meta(max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_INT)]
TokenIds = list[TokenId]
StopStrings = Annotated[list[Annotated[str, Meta(min_length=1, max_length=1024)]], Meta(max_length=64)]
StopIds = Annotated[TokenIds, Meta(max_length=256)]


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class Sampling(Struct, kw_only=True):
    """The fields that both endpoints share. Floats are bounded in `blade.api.params`."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, INT64] | None = None
    stop: Annotated[str, Meta(min_length=1, max_length=1024)] | StopStrings | None = None
    stop_sequences: Annotated[str, Meta(min_length=1, max_length=1024)] | StopStrings | None = None
    stop_tokens: StopIds | None = None
    stop_token_ids: StopIds | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[TokenId, float], Meta(max_length=1024)] | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    logits_processors: Annotated[dict[str, Any], Meta(max_length=16)] | None = None
    priority: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    user: Name | None = None
    response_format: str | dict[str, Any] | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None


class CompletionRequest(Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | TokenId | TokenIds], Meta(min_length=1)]
    echo: bool | None = None


class ContentPart(Struct):
    type: Name
    text: str | None = None


class FunctionCall(Struct):
    name: Name
    arguments: str = "{}"


class ToolCall(Struct):
    function: FunctionCall
    id: Name | None = None
    type: Literal["function"] = "function"


class Message(Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    tool_call_id: Name | None = None


class Function(Struct, omit_defaults=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Struct):
    type: Literal["function"]
    function: Function


class Prediction(Struct):
    """What the client expects the reply to be, mostly: a file that is to be changed a little, say."""

    type: Literal["content"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


class ChatRequest(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    resume_response: str | None = None
    prediction: Prediction | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: Annotated[dict[Name, bool | int | float | Name], Meta(max_length=16)] | None = None


NOT_YET = "is not supported by this version."
REFUSED = dict.fromkeys(
    (
        *("guided_regex", "guided_json", "guided_choice", "guided_grammar", "guided_whitespace_pattern"),
        *("suffix", "prompt_logprobs", "prompt_embeds", "allowed_token_ids", "bad_words", "beam_width"),
        *("functions", "function_call", "audio", "documents"),
    ),
    NOT_YET,
) | {
    "chat_template": "cannot be set by a request; the server's --chat-template can.",
    "kv_transfer_params": "is internal and cannot be set by a request.",
    "semi_p_inst_id": "is internal and cannot be set by a request.",
    "semi_d_inst_id": "is internal and cannot be set by a request.",
}
"""Fields that would change the reply and cannot be honoured: refused by name, where unknown ones are ignored."""

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T", bound=Sampling)
_Refused = msgspec.defstruct("_Refused", [(name, Any, None) for name in REFUSED])


@cache
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    """Lax: "true", "12" and 12.0 are taken for true and 12, as BladeLLM's clients send them."""
    return msgspec.json.Decoder(kind, strict=False)


def parse(body: bytes, kind: type[S]) -> S:
    """A struct from its JSON. Raises RequestError naming the field."""
    try:
        value: S = _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error.args[0]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the last: nested too deeply
        raise RequestError("The body is not valid JSON.") from None
    return value


def decode(body: bytes, kind: type[T]) -> T:
    """A generation request from its JSON. Raises RequestError naming the field."""
    request, refused = parse(body, kind), parse(body, _Refused)
    for name, reason in REFUSED.items():
        if getattr(refused, name) is not None:
            raise RequestError(f"{name} {reason}", param=name)
    _refuse_unsupported(request)
    return request


def _refuse_unsupported(request: Sampling) -> None:
    kind = request.response_format
    if (kind.get("type") if isinstance(kind, dict) else kind) not in (None, "text"):
        raise RequestError(f'response_format other than "text" {NOT_YET}', param="response_format")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError(f"best_of other than n {NOT_YET}", param="best_of")
    if request.use_beam_search:
        raise RequestError(f"use_beam_search {NOT_YET}", param="use_beam_search")


_VALIDATION = re.compile(r"(?P<text>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")
_EXPECTED = re.compile(r"Expected `(?P<type>[^`]*)`(?P<rest>.*)", re.DOTALL)
_TYPE_NAMES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "array": "list",
    "object": "object",
    "null": "null",
}


def _invalid(text: str) -> RequestError:
    """msgspec's sentence, in the words BladeLLM's clients know, with the field's path as they write it."""
    match = _VALIDATION.fullmatch(text)
    reason, path = (match["text"], match["path"] or "") if match else (text, "")
    if missing := _MISSING.fullmatch(reason):
        path = f"{path}.{missing['name']}".lstrip(".")
        reason = "Field required"
    elif expected := _EXPECTED.fullmatch(reason):
        names = [_TYPE_NAMES.get(name, name) for name in expected["type"].split(" | ")]
        got = re.sub(r"`(\w+)`", lambda found: _TYPE_NAMES.get(found[1], found[1]), expected["rest"])
        reason = f"Input should be a valid {' or '.join(names)}{got}"
    return RequestError(f"{path}: {reason}." if path else f"{reason}.", param=path or None)
