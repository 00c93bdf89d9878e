"""Kits for the streaming parsers of chat replies: the result must not depend on where the stream is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from blade.contracts import ReasoningParser, Tokenizer, ToolParser
from blade.testing.fakes import ByteTokenizer
from blade.testing.require import require


def check_tool_parser(
    factory: Callable[[Tokenizer], ToolParser], replies: Sequence[str], tokenizer: Tokenizer | None = None
) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each reply what every split of it gives: (text shown, [(function, arguments)])."""
    results = []
    for reply in replies:
        seen = [_run_tool_parser(factory(tokenizer or ByteTokenizer()), pieces) for pieces in _splits(reply)]
        _require_equal(seen, reply)
        results.append(seen[0])
    return results


def check_reasoning_parser(
    factory: Callable[[Tokenizer], ReasoningParser], replies: Sequence[str], tokenizer: Tokenizer | None = None
) -> list[tuple[str, str]]:
    """For each reply what every split of it gives: (reasoning, answer)."""
    results = []
    for reply in replies:
        seen = [_run_reasoning_parser(factory(tokenizer or ByteTokenizer()), pieces) for pieces in _splits(reply)]
        _require_equal(seen, reply)
        results.append(seen[0])
    return results


def _splits(reply: str) -> Iterator[list[str]]:
    rng = random.Random(len(reply))  # noqa: S311
    yield [reply]
    yield list(reply)
    for _ in range(8):
        cuts = sorted(rng.choices(range(len(reply) + 1), k=rng.randint(1, 5)))
        yield [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]


def _run_tool_parser(parser: ToolParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    shown = ""
    calls: dict[int, dict[str, str]] = {}
    for piece, final in [*((piece, False) for piece in pieces), ("", True)]:
        text, deltas = parser.push(piece, final)
        shown += text
        for delta in deltas:
            _merge(calls, delta)
    require(list(calls) == list(range(len(calls))), f"calls must be numbered from 0 in order, not {list(calls)}")
    for call in calls.values():
        require(bool(call["id"]), f"the call of {call['name']!r} has no id")
        json.loads(call["arguments"])
    return shown, [(call["name"], call["arguments"]) for call in calls.values()]


def _merge(calls: dict[int, dict[str, str]], delta: dict[str, Any]) -> None:
    """Add one OpenAI `tool_calls` delta: the first of a call has id, type and name, all may add to the arguments."""
    function = delta.get("function", {})
    if delta["index"] not in calls:
        require(delta.get("type") == "function", f"the first delta of a call needs type 'function': {delta}")
        require(bool(function.get("name")), f"the first delta of a call needs a function name: {delta}")
        calls[delta["index"]] = {"id": delta.get("id", ""), "name": function["name"], "arguments": ""}
    calls[delta["index"]]["arguments"] += function.get("arguments", "")


def _run_reasoning_parser(parser: ReasoningParser, pieces: list[str]) -> tuple[str, str]:
    pairs = [*(parser.push(piece) for piece in pieces), parser.push("", final=True)]
    return "".join(reasoning for reasoning, _ in pairs), "".join(answer for _, answer in pairs)


def _require_equal(seen: list[Any], reply: str) -> None:
    other = next((result for result in seen if result != seen[0]), seen[0])
    require(other == seen[0], f"the split of {reply!r} matters: {seen[0]!r} whole, {other!r} in pieces")
