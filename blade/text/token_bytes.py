"""What bytes a token stands for: byte-level BPE writes each byte as a printable character, SentencePiece writes a
space as "▁" and a byte it has no character for as "<0x0A>"."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import msgspec
from tokenizers import Tokenizer

from blade.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte (Radford et al. 2019): printable Latin-1 stands for itself, the others for the
    characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes(dict[int, bytes]):
    """Token id -> bytes, filled as ids are met. b"" for control tokens and for ids that are no token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises CheckpointError when the tokenizer decodes in a way that cannot be said token by token."""
        super().__init__()
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._alphabet: dict[str, int] = {}  # empty: not byte-level
        self._replacements: list[tuple[str, str]] = []
        self._byte_fallback = False
        self.drops_space = False  # decoding drops one space at the start of the text
        self.update({i: b"" for i, token in tokenizer.get_added_tokens_decoder().items() if token.special})
        state = tokenizer.decoder and tokenizer.decoder.__getstate__()  # its JSON
        self._read_decoder(msgspec.json.decode(state) if state else {"type": None})

    def _read_decoder(self, step: dict[str, Any]) -> None:
        match step:
            case {"type": "Sequence", "decoders": list(steps)}:
                for inner in steps:
                    self._read_decoder(inner)
            case {"type": "ByteLevel"}:
                self._alphabet = byte_alphabet()
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                self._replacements.append((pattern, content))
            case {"type": "Metaspace", "replacement": pattern, "prepend_scheme": scheme}:
                self._replacements.append((pattern, " "))
                self.drops_space = scheme != "never"
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self.drops_space = True
            case {"type": "Fuse"}:
                pass
            case _:
                raise CheckpointError(f"The tokenizer's decoder {step['type']!r} is not supported.")

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        data = self[token_id] = self._spell(token, token_id in self._added)
        return data

    def _spell(self, token: str, is_added: bool) -> bytes:
        if self._alphabet and not is_added:
            with suppress(KeyError):  # as in the tokenizers library, a token with any other character is plain text
                return bytes([self._alphabet[char] for char in token])
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token.encode()
