"""Conversations to prompts, by the model's own Jinja template."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import meta

from blade.errors import CheckpointError, RequestError
from blade.text.chat_environment import TemplateRefusal, chat_environment
from blade.text.chat_limits import ALLOWANCE, Allowance, LimitedEnvironment
from blade.text.chat_sizes import TooMuch
from blade.text.chat_template_files import folder_sources, gguf_sources, override_source
from blade.text.control_guard import ControlGuard
from blade.text.gguf_tokenizer import GGUFVocabulary
from blade.text.tokenizer_files import read_special_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from blade.contracts import Tokenizer

MOST_SOURCE = 1 << 16  # characters: those of real models have 20,000 at most, and compiling takes 10 to 30 us for each
ROLES = frozenset(["system", "developer", "user", "assistant", "tool", "function"])
_REMEDY = "Pass --chat-template with a file that is a template for this model."
_RESERVED = frozenset(["messages", "tools", "documents", "add_generation_prompt"])

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


def load_chat_template(
    path: Path, gguf_metadata: Mapping[str, Any] | None = None, override: Path | None = None
) -> ChatTemplate | None:
    """The template in the file `override`, else the model's own: of a folder, or of the GGUF file whose metadata is
    given. None: it has none. Raises CheckpointError for a malformed one."""
    if gguf_metadata is not None:
        found, special_tokens = gguf_sources(path, gguf_metadata), GGUFVocabulary(path, gguf_metadata).special_tokens()
    else:
        found, special_tokens = folder_sources(path), read_special_tokens(path)
    source, tool_source, name = override_source(override) if override else found
    if not isinstance(source, str | None) or not isinstance(tool_source, str | None):
        raise CheckpointError(f"{name} is not a text.")
    return ChatTemplate(source, special_tokens, tool_source, name) if source is not None else None


class ChatTemplate:
    """One model's chat template, compiled."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        tool_source: str | None = None,
        name: str = "the chat template",
        max_chars: int = 16 << 20,
        max_seconds: float = 5.0,
    ) -> None:
        """`special_tokens` are variables of the template: {"bos_token": "<s>", ...}. `tool_source` is used instead
        of `source` where there are tools. `name` is for the CheckpointError that malformed sources raise.

        Rendering stops at max_chars of output, and after max_seconds of computing.
        """
        self._source = source + (tool_source or "")
        if len(self._source) > MOST_SOURCE:
            raise CheckpointError(
                f"{name} has {len(self._source)} characters, of which blade takes {MOST_SOURCE} at most.", _REMEDY
            )
        self._special_tokens = dict(special_tokens or {})
        self._max_chars, self._max_seconds = max_chars, max_seconds
        self._guard: tuple[Tokenizer, ControlGuard] | None = None
        environment = chat_environment()
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(tool_source) if tool_source else self._template
            names = {name for text in (source, tool_source or "") for name in _variables(environment, text)}
        except Exception as error:  # Jinja's own, and Python's of what it makes of templates: nested too deeply
            raise CheckpointError(f"{name} is not a valid Jinja template.", _REMEDY) from error
        self.options = frozenset(n for n in names - _RESERVED if not n.endswith("_token"))
        """Names of the arguments a request may set."""

    def render(
        self,
        messages: Messages,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        **options: bool | int | float | str,
    ) -> str:
        """The conversation as text. A message is {"role": ..., "content": str or [{"type": "text", "text": ...}]} and
        whatever else the template reads. Raises RequestError for what the template or blade refuses."""
        return self._render(_check_messages(messages), tools, add_generation_prompt, self._check_options(options))

    def render_ids(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        **options: bool | int | float | str,
    ) -> list[int]:
        """The conversation as ids. The template's control tokens count; nothing in messages, tools or options ever
        becomes one, whatever it says. Arguments and errors as in `render`."""
        checked = _check_messages(messages)
        request = [[{**m, "role": ""} for m in checked], tools, self._check_options(options)]
        try:
            (safe, tools, options), literals = self._guard_for(tokenizer).protect(request, avoid=self._source)
        except RecursionError:
            raise RequestError("messages or tools are nested too deeply.", "messages") from None
        # Roles are known words; templates make control tokens of them.
        safe = [{**message, "role": original["role"]} for message, original in zip(safe, checked, strict=True)]
        return tokenizer.encode_template(self._render(safe, tools, add_generation_prompt, options), literals)

    def _render(self, messages: list[dict[str, Any]], tools: Tools | None, add: bool, options: dict[str, Any]) -> str:
        template = self._tool_template if tools else self._template
        deadline = time.thread_time() + self._max_seconds
        variables = {**self._special_tokens, **options, "messages": messages, "tools": tools or None}
        variables[ALLOWANCE] = Allowance(deadline)
        pieces, num_chars = [], 0
        try:
            for piece in template.generate(**variables, add_generation_prompt=add):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > self._max_chars or time.thread_time() > deadline:
                    raise TooMuch
        except TooMuch:
            raise RequestError("The conversation is too much for the chat template.", "messages") from None
        except TemplateRefusal as refusal:
            raise RequestError(f"The chat template refuses this: {str(refusal)[:500]}", "messages") from None
        except Exception as error:  # the template's own mistakes are of any kind
            raise RequestError("The chat template cannot render these messages.", "messages") from error
        return "".join(pieces)

    def _check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            param = f"chat_template_kwargs.{name}"
            if name not in self.options:
                raise RequestError(f"The model's chat template takes no {name}.", param)
            if not isinstance(value, int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
                raise RequestError(f"{param} is neither a boolean, a number nor a string.", param)
        return dict(options)

    def _guard_for(self, tokenizer: Tokenizer) -> ControlGuard:
        if self._guard is None or self._guard[0] is not tokenizer:
            self._guard = tokenizer, ControlGuard(tokenizer.control_tokens)
        return self._guard[1]


def _variables(environment: LimitedEnvironment, source: str) -> set[str]:
    """What the template reads and does not set itself."""
    return meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys()


def _check_messages(messages: Messages) -> list[dict[str, Any]]:
    """Copies with text contents and known roles."""
    checked = []
    for i, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise RequestError(f"messages[{i}].role is none of {', '.join(sorted(ROLES))}.", f"messages[{i}].role")
        copy = dict(message)
        if "content" in message:
            copy["content"] = _text(message["content"], f"messages[{i}].content")
        checked.append(copy)
    return checked


def _text(content: Any, path: str) -> str | None:
    """Text parts are joined by newlines, as vLLM and llama.cpp do."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{path} is neither a string nor a list of parts.", path)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{path}[{i}] is no text part; others are not supported.", f"{path}[{i}].type")
    return "\n".join(part["text"] for part in content)
