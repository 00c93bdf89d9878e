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
    """All deltas of one choice, put together. Without `keeps_sampled` their tokens are left out: only log-probabilities
    are made of them, and a token takes some 100 bytes."""

    index: int
    keeps_sampled: bool = True
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
        if self.keeps_sampled:
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
        self._stopped = False  # by a stop string

    def take(self, output: Output) -> list[Delta]:
        """One delta per output, but the end by a stop token or stop string is a delta of its own without text."""
        sampled, reason = output.sampled, output.finish_reason
        # The stop token is counted and delivered, but has no text.
        num_shown = len(sampled) - 1 if reason == "stop" else len(sampled)
        shown, end_token = sampled[:num_shown], sampled[num_shown:]
        text, num_read = self._read([s.token_id for s in shown])
        if num_read < len(shown) or self._stopped:  # under speculation there may be tokens after a stop string
            shown, end_token, reason = shown[:num_read], [], "stop"
        self.num_tokens += len(end_token)
        if reason is not None and not self._stopped:
            text += self._flush()
            reason = "stop" if self._stopped else reason
        delta = self._parse(Delta(self.seq.index, self._with_echo(text), sampled=shown), final=reason is not None)
        if reason == "stop":
            self.finish_reason = "tool_calls" if self._has_called else "stop"
            last = Delta(self.seq.index, end_token=end_token, finish_reason=self.finish_reason)
            return [delta, last] if delta.has_text or delta.sampled else [last]
        self.finish_reason = delta.finish_reason = reason
        delta.error = output.error
        return [delta]

    def _read(self, ids: list[int]) -> tuple[str, int]:
        """(new text, how many of the ids it took: those up to the one that completed a stop string)."""
        if self._stops is None:
            self.num_tokens += len(ids)
            return self._detokenizer.push(ids) if ids else "", len(ids)
        text = ""
        for num_read, token_id in enumerate(ids, start=1):
            self.num_tokens += 1
            text += self._stop_in(self._detokenizer.push([token_id]))
            if self._stopped:
                return text, num_read
        return text, len(ids)

    def _stop_in(self, text: str) -> str:
        """What of it may be shown. Stop strings do not count before min_tokens."""
        if self._stops is None or self.num_tokens < self.seq.params.min_tokens:
            return text
        text, matched = self._stops.push(text)
        self._stopped = matched is not None
        return text

    def _flush(self) -> str:
        """The choice has ended: what was held back."""
        text = self._stop_in(self._detokenizer.flush())
        return text + self._stops.flush() if self._stops is not None and not self._stopped else text

    def _with_echo(self, text: str) -> str:
        text, self._echo = self._echo + text, ""
        return text

    def _parse(self, delta: Delta, final: bool) -> Delta:
        if self._reasoning_parser is not None:
            delta.reasoning, delta.text = self._reasoning_parser.push(delta.text, final)
        if self._tool_parser is not None:
            delta.text, delta.tool_calls = self._tool_parser.push(delta.text, final)
            self._has_called = self._has_called or bool(delta.tool_calls)
        return delta
