"""One streamed request, timed, in either dialect."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Result:
    """Times in seconds. Tokens are counted by the server's `usage`, never by its chunks."""

    error: str = ""
    first_token: float = 0.0  # from sending the request
    gaps: list[float] = field(default_factory=list)  # between one arrival of tokens and the next
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


async def request(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Result:
    """POST a completion and read its stream to the end. Whatever goes wrong is in the result."""
    result = Result()
    try:
        started = time.perf_counter()
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                result.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return result
            await _read(response, result, started)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        result.error = repr(error)[:200]
    result.error = result.error or _contradiction(result, body)
    return result


async def _read(response: aiohttp.ClientResponse, result: Result, started: float) -> None:
    last = 0.0
    async for event in _events(response):
        if error := event.get("error") or event.get("error_info"):
            result.error = str(error)[:200]
            return
        has_tokens = any(choice.get("text") for choice in event.get("choices", []))
        if usage := event.get("usage"):
            # BladeLLM's dialect has usage in each chunk, and so tells of tokens without text, too.
            has_tokens |= bool(event.get("choices")) and usage["completion_tokens"] > result.output_tokens
            result.prompt_tokens = usage["prompt_tokens"]
            result.output_tokens = usage["completion_tokens"]
            result.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if has_tokens:
            now = time.perf_counter()
            if last:
                result.gaps.append(now - last)
            else:
                result.first_token = now - started
            last = now


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each `data:` line, until [DONE]."""
    async for line in response.content:
        data = line.strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if line.startswith(b"data:"):
            yield json.loads(data)
    raise ValueError("the stream has ended without [DONE]")


def _contradiction(result: Result, body: dict[str, Any]) -> str:
    """What does not fit: figures for other lengths than asked for would mean nothing."""
    asked, got = (len(body["prompt"]), body["max_tokens"]), (result.prompt_tokens, result.output_tokens)
    return "" if asked == got else f"asked for {asked} tokens of prompt and output, the server counts {got}"
