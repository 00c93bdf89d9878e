"""Prompts of an exact length: lists of token ids, so that nobody's tokenizer can make them longer."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from pydoc_data.topics import topics

COMMON_IDS = range(1000, 9000)  # ordinary tokens in about every vocabulary


@functools.cache
def tokenize_topics(tokenizer: Path) -> list[int]:
    """Python's own help texts as token ids. `tokenizer`: a folder with tokenizer.json, that file, or a .gguf file."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    if tokenizer.suffix == ".gguf":
        from blade.checkpoint.gguf import read_gguf
        from blade.text.tokenizer import load_tokenizer

        return load_tokenizer(tokenizer, read_gguf(tokenizer).metadata).encode(text, add_special_tokens=False)
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    return Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids


class Prompts:
    """Slices of a text at random places, or random ids where there is none; a new one each time.

    The first `shared_prefix` tokens are the same in all of them.
    """

    def __init__(self, text: list[int] | None, num_tokens: int, shared_prefix: int, seed: int) -> None:
        self._text = text
        self._random = random.Random(seed)
        self._prefix = self._slice(shared_prefix)
        self._num_own = num_tokens - shared_prefix

    def next(self) -> list[int]:
        return self._prefix + self._slice(self._num_own)

    def _slice(self, num_tokens: int) -> list[int]:
        if self._text is None:
            return self._random.choices(COMMON_IDS, k=num_tokens)
        if num_tokens > len(self._text):
            raise SystemExit(f"The text has {len(self._text)} tokens: a prompt cannot have {num_tokens}.")
        start = self._random.randrange(len(self._text) - num_tokens + 1)
        return self._text[start : start + num_tokens]
