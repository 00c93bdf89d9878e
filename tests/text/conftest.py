"""Two tiny tokenizers of the two kinds, made from the metadata a GGUF file would carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blade.text.token_bytes import byte_alphabet
from blade.text.tokenizer import HFTokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ Ġ", "i m", "e n", "en d", "ä ½"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    types = [NORMAL] * len(tokens)
    others = {"<|endoftext|>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<tool_call>": USER_DEFINED}
    others |= {"[PAD0]": UNUSED}
    metadata = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [*tokens, *others],
        "token_type": [*types, *others.values()],
        "merges": MERGES,
        "eos_token_id": len(tokens) + 2,
        "bos_token_id": len(tokens),
        "add_bos_token": False,
    }
    named = {f"tokenizer.ggml.{name}": value for name, value in (metadata | changes).items() if value is not None}
    return named | {"tokenizer.chat_template": CHATML}


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    words = ["▁t", "he", "▁the", "in", "▁in", "ab", "bc", "abc", "▁ab", "th", "▁▁", "aa"]
    chars = [*"▁abcdefghint", "é"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(words) + len(chars))]
    metadata = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *byte_tokens, *words, *chars],
        "token_type": types,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(words) + len(chars))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | changes).items() if value is not None}


@pytest.fixture(scope="session")
def byte_level() -> HFTokenizer:
    return load_tokenizer(Path("tiny.gguf"), byte_level_metadata())


@pytest.fixture(scope="session")
def sentencepiece() -> HFTokenizer:
    return load_tokenizer(Path("tiny.gguf"), sentencepiece_metadata())
