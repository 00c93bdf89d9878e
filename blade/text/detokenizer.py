"""Token ids to text while they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blade.contracts import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """One stream of ids. Whatever way they are cut into pushes, the texts joined are `tokenizer.decode` of all ids.

    Characters split over tokens are held back until they are complete; U+FFFD stands for bytes that never become one.
    `continues` says that the ids go on from a text, so that a SentencePiece tokenizer's leading space is a real one.
    Control tokens have no text. Linear in the number of bytes.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = _Utf8Decoder(errors="replace")
        self._at_start = not continues

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain now."""
        if self._at_start:
            return self._start(list(ids))
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def flush(self) -> str:
        """The rest; the stream has ended."""
        return self._utf8.decode(b"", final=True)

    def _start(self, ids: list[int]) -> str:
        for i, token_id in enumerate(ids):
            if data := self._token_bytes(token_id):
                self._at_start = False
                drop = self._drops_space(token_id, data)
                return self._utf8.decode(data[drop:] + b"".join(map(self._token_bytes, ids[i + 1 :])))
        return ""

    def _drops_space(self, token_id: int, data: bytes) -> bool:
        """Whether decoding leaves out the first space of a text that begins with this token."""
        return data[:1] == b" " and data.decode(errors="replace") == " " + self._tokenizer.decode([token_id])
