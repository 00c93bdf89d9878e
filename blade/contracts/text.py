"""Token ids and text, on the loop thread. See blade.contracts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq


class Tokenizer(Protocol):
    """The loop thread's view of a tokenizer."""

    eos_token_ids: tuple[int, ...]
    vocab_size: int  # ids that have text; the logits may be wider
    control_tokens: Mapping[str, int]  # text -> id of every token that steers the model

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. With add_special_tokens the tokenizer's own BOS or EOS is added as its files say; the text
        itself never yields a control token."""
        ...

    def encode_template(self, text: str, literals: Mapping[str, str] | None = None) -> list[int]:
        """Ids of a rendered chat template, in which control tokens count and nothing is added. `literals` maps
        stand-in characters of the text to what they stand for: plain text, whatever it looks like."""
        ...

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; b"" for a control token and for an id that is no token."""
        ...


class ToolParser(Protocol):
    """Takes tool calls out of a chat reply while it streams. One object per choice."""

    def push(self, text: str, final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """New text in; (text to show, OpenAI `tool_calls` deltas) out. With final, what is held back is flushed."""
        ...


class ReasoningParser(Protocol):
    """Splits the reasoning from the answer while a chat reply streams. One object per choice."""

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        """New text in; (reasoning, answer) out."""
        ...
