"""The text side of one sequence: ids in; text, reasoning and tool calls out, until a stop string or the engine ends
it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blade.text.detokenizer import Detokenizer
from blade.text.stop import StopStrings, StopTable

if TYPE_CHECKING:
    from blade.contracts import ReasoningParser, Tokenizer, ToolParser
    from blade.types import Output, Sampled, Sequence


@dataclass(slots=True)
class Delta:
    """What one engine step brought one choice."""

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's deltas
    sampled: list[Sampled] = field(default_factory=list)
    end_token: list[Sampled] = field(default_factory=list)  # the stop token where one ended it: counted, not shown
    finish_reason: str | None = None
    error: Exception | None = None  # with finish_reason "error"

    @property
    def num_tokens(self) -> int:
        return len(self.sampled) + len(self.end_token)

    @property
    def has_text(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls)


@dataclass(slots=True)
class Reply:
    """All deltas of one choice, put together."""

    index: int
    sampled: list[Sampled] = field(default_factory=list)
    end_token: list[Sampled] = field(default_factory=list)
    finish_reason: str | None = None
    _texts: list[str] = field(default_factory=list)
    _reasonings: list[str] = field(default_factory=list)
    _calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasonings)

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        return list(self._calls.values())

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._reasonings.append(delta.reasoning)
        self.sampled += delta.sampled
        self.end_token += delta.end_token
        self.finish_reason = delta.finish_reason or self.finish_reason
        for call in delta.tool_calls:
            self._add_call(**call)

    def _add_call(self, index: int, function: dict[str, str], **rest: Any) -> None:
        """OpenAI's rule: a delta belongs to the call of its index; the first brings id and name, all arguments."""
        if (call := self._calls.get(index)) is not None:
            call["function"]["arguments"] += function.get("arguments", "")
        else:
            self._calls[index] = {"type": "function", **rest, "function": {"arguments": "", **function}}


class Choice:
    """Turns one sequence's outputs into deltas. `continues`: the text goes on from the prompt's, rather than being a
    new one; `echo` is text that goes before everything else."""

    def __init__(
        self,
        seq: Sequence,
        tokenizer: Tokenizer,
        stops: StopTable | None,
        continues: bool = True,
        echo: str = "",
        reasoning_parser: ReasoningParser | None = None,
        tool_parser: ToolParser | None = None,
    ) -> None:
        self.seq = seq
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._detokenizer = Detokenizer(tokenizer, continues)
        self._stops = StopStrings(stops) if stops else None
        self._echo = echo
        self._reasoning_parser = reasoning_parser
        self._tool_parser = tool_parser
        self._has_called = False  # a tool

    def take(self, output: Output) -> list[Delta]:
        """One delta per output, but the end by a stop token or stop string is a delta of its own without text."""
        sampled, reason = output.sampled, output.finish_reason
        self.num_tokens += len(sampled)
        # The stop token is counted and delivered, but has no text.
        num_shown = len(sampled) - 1 if reason == "stop" else len(sampled)
        text, stopped = self._read([s.token_id for s in sampled[:num_shown]], final=reason is not None)
        if stopped:
            reason = "stop"
        delta = self._parse(Delta(self.seq.index, text, sampled=sampled[:num_shown]), final=reason is not None)
        if reason == "stop":
            self.finish_reason = "tool_calls" if self._has_called else "stop"
            last = Delta(self.seq.index, end_token=sampled[num_shown:], finish_reason=self.finish_reason)
            return [delta, last] if delta.has_text or delta.sampled else [last]
        self.finish_reason = delta.finish_reason = reason
        delta.error = output.error
        return [delta]

    def _read(self, ids: list[int], final: bool) -> tuple[str, bool]:
        """(new text, whether a stop string has ended it). Stop strings do not count before min_tokens."""
        text = self._detokenizer.push(ids) if ids else ""
        if final:
            text += self._detokenizer.flush()
        stopped = False
        if self._stops is not None and self.num_tokens >= self.seq.params.min_tokens:
            text, matched = self._stops.push(text)
            stopped = matched is not None
            if final and not stopped:
                text += self._stops.flush()
        if self._echo:
            text, self._echo = self._echo + text, ""
        return text, stopped

    def _parse(self, delta: Delta, final: bool) -> Delta:
        if self._reasoning_parser is not None:
            delta.reasoning, delta.text = self._reasoning_parser.push(delta.text, final)
        if self._tool_parser is not None:
            delta.text, delta.tool_calls = self._tool_parser.push(delta.text, final)
            self._has_called = self._has_called or bool(delta.tool_calls)
        return delta
