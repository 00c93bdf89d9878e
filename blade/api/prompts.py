"""From what a request says to prompt ids. That is worked out in a thread, for the loop has others to serve: long texts
take long, and so may short ones by a template or a tokenizer that strangers wrote. The thread costs some 50 us."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from blade.api.wire import MAX_PROMPTS, NOT_YET
from blade.errors import RequestError

if TYPE_CHECKING:
    from blade.api.wire import ChatRequest, CompletionRequest, Message, ToolCall
    from blade.contracts import Tokenizer
    from blade.text.chat_template import ChatTemplate
    from blade.types import Limits

RESERVED_OPTIONS = {"self", "tokenizer", "messages", "tools", "add_generation_prompt"}  # of render_ids


async def completion_prompts(request: CompletionRequest, tokenizer: Tokenizer, limits: Limits) -> list[list[int]]:
    """One list of ids per prompt; raises RequestError for an empty one, and for more than the server runs at once.
    What ids were given is not checked here."""
    texts, prompts = split_prompt(request.prompt, limits)
    check_count(len(texts) or len(prompts), request.n or 1, "prompt", limits)
    if texts:
        prompts = await asyncio.to_thread(lambda: [tokenizer.encode(text) for text in texts])
    for index, prompt in enumerate(prompts):
        if not prompt:
            path = f"prompt[{index}]" if len(prompts) > 1 else "prompt"
            raise RequestError(f"{path} is empty.", param=path)
    return prompts


def split_prompt(prompt: str | list[Any], limits: Limits) -> tuple[list[str], list[list[int]]]:
    """(texts, []) or ([], lists of ids) out of the four forms a prompt comes in. Lengths come first: what is far too
    long is not looked through."""
    if isinstance(prompt, str):
        return [prompt], []
    kind = type(prompt[0])
    if kind is int and len(prompt) > limits.max_context:
        raise RequestError(
            f"prompt has {len(prompt)} tokens, the context {limits.max_context}.", "prompt", "Shorten it."
        )
    if kind is not int and len(prompt) > MAX_PROMPTS:
        raise RequestError(f"prompt has {len(prompt)} items, more than {MAX_PROMPTS}.", param="prompt")
    if len(set(map(type, prompt))) > 1:
        raise RequestError("prompt mixes strings, ids and lists; give one kind.", param="prompt")
    if kind is int:
        return [], [prompt]
    return (prompt, []) if kind is str else ([], prompt)


def check_count(num_prompts: int, n: int, field: str, limits: Limits) -> None:
    if num_prompts * n > limits.max_num_seqs:
        raise RequestError(
            f"{field} and n ask for {num_prompts} times {n} sequences, the server runs {limits.max_num_seqs} at once.",
            param="n" if n > 1 else field,
        )


async def echoed(request: CompletionRequest, prompts: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    """Each prompt's text as the client wrote it, or what its ids stand for; [] unless `echo` asks for it."""
    if not request.echo:
        return []
    if isinstance(request.prompt, str):
        return [request.prompt]
    if texts := [prompt for prompt in request.prompt if isinstance(prompt, str)]:
        return texts
    return await asyncio.to_thread(lambda: [tokenizer.decode(prompt) for prompt in prompts])


async def chat_prompt(
    request: ChatRequest, template: ChatTemplate | None, tokenizer: Tokenizer, has_tool_parser: bool
) -> list[int]:
    """Ids of the rendered conversation, up to where the reply goes on."""
    if template is None:
        raise RequestError(
            "The model has no chat template.", "messages", "Use /v1/completions, or start with --chat-template FILE."
        )
    _check_tools(request, has_tool_parser)
    if taken := (request.chat_template_kwargs or {}).keys() & RESERVED_OPTIONS:
        raise RequestError(f"{min(taken)} is not for a request to set.", param="chat_template_kwargs")
    try:
        return await asyncio.to_thread(_render, request, template, tokenizer)
    except RecursionError:
        raise RequestError("messages or tools are nested too deeply.", param="messages") from None


async def predicted(request: ChatRequest, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """Ids of what the client expects the reply to be, [] where it says nothing of that."""
    if request.prediction is None:
        return []
    text = request.prediction.text
    ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=False)
    if len(ids) > max_tokens:
        raise RequestError(
            f"prediction has {len(ids)} tokens, the context {max_tokens}.", "prediction", "Predict less, or nothing."
        )
    return ids


def _render(request: ChatRequest, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    messages = [_template_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)]
    tools = [msgspec.to_builtins(tool) for tool in request.tools or []] if uses_tools(request) else None
    options = request.chat_template_kwargs or {}
    ids = template.render_ids(tokenizer, messages, tools=tools, add_generation_prompt=True, **options)
    return ids + tokenizer.encode(request.resume_response or "", add_special_tokens=False)


def uses_tools(request: ChatRequest) -> bool:
    return bool(request.tools) and request.tool_choice != "none"


def _check_tools(request: ChatRequest, has_tool_parser: bool) -> None:
    if request.tool_choice not in (None, "none", "auto"):
        raise RequestError(f'tool_choice other than "none" and "auto" {NOT_YET}', param="tool_choice")
    if uses_tools(request) and not has_tool_parser:
        raise RequestError("The server parses no tool calls.", "tools", "Start it with --tool-parser NAME.")


def _template_message(message: Message, path: str) -> dict[str, Any]:
    """A message as chat templates expect it: roles they know (they skip others without a word), parsed arguments."""
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    out: dict[str, Any] = {"role": role, "content": msgspec.to_builtins(message.content) or ""}
    for field in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, field)) is not None:
            out[field] = value
    if message.tool_calls:
        out["tool_calls"] = [
            _template_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return out


def _template_call(call: ToolCall, path: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        field = f"{path}.function.arguments"
        raise RequestError(f"{field} is not a JSON object.", param=field) from None
    return {"type": "function", "id": call.id, "function": {"name": call.function.name, "arguments": arguments}}
