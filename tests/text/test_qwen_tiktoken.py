"""qwen.tiktoken against tiktoken's algorithm written out."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from itertools import pairwise, product, takewhile
from pathlib import Path

import pytest

from blade.errors import CheckpointError
from blade.testing import check_tokenizer
from blade.text.chat_template import load_chat_template
from blade.text.qwen_tiktoken import CONTROL_TOKENS
from blade.text.tokenizer import load_tokenizer

LETTERS = "abc"


def make_tokens() -> list[bytes]:
    """Bytes, and half of all short words of three letters in no sound order: tokens that no pair makes, tokens that
    many pairs make, and parts that come after the whole."""
    rng = random.Random(0)
    words = ["".join(word) for length in (2, 3, 4) for word in product(LETTERS, repeat=length)]
    others = [*rng.sample(words, len(words) // 2), " a", " ab", "你", "é", "hello", "he", "ll", "hell"]
    rng.shuffle(others)
    return [*(bytes([i]) for i in range(256)), *(word.encode() for word in others if len(word.encode()) > 1)]


def lines_of(tokens: list[bytes]) -> list[str]:
    return [f"{b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]


def joined(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken makes of one word."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines_of(make_tokens())) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"chat_format": "chatml", "eos_token_id": len(make_tokens())})
    )
    return tmp_path


def test_words_are_joined_as_by_tiktoken(folder: Path) -> None:
    tokenizer, rng = load_tokenizer(folder), random.Random(1)
    ranks = {token: rank for rank, token in enumerate(make_tokens())}
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 40))) for _ in range(500)]
    for word in [*words, " abcabc", "hellohello", "é你"]:
        assert tokenizer.encode(word) == joined(word.encode(), ranks), word


def test_it_is_a_tokenizer_with_qwen_s_words_and_control_tokens(folder: Path) -> None:
    tokenizer, num = load_tokenizer(folder), len(make_tokens())
    check_tokenizer(tokenizer)
    assert list(tokenizer.control_tokens) == list(CONTROL_TOKENS)
    assert list(tokenizer.control_tokens.values()) == list(range(num, num + 208))
    assert tokenizer.eos_token_ids == (num, num + 2)
    assert len(tokenizer.encode("12")) == 2  # each digit is a word
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert num + 2 not in tokenizer.encode("<|im_end|>")


def test_chats_are_chatml_where_the_folder_says_so(folder: Path) -> None:
    template = load_chat_template(folder)
    assert template is not None
    user = {"role": "user", "content": "hi"}
    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render([user]) == f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{turn}"
    assert template.render([{"role": "system", "content": "s"}, user]) == f"<|im_start|>system\ns<|im_end|>\n{turn}"
    (folder / "generation_config.json").write_text('{"chat_format": "raw"}')
    assert load_chat_template(folder) is None


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("YWI", "line 301"),
        ("", "line 301"),
        ("YWI= x", "line 301"),
        ("YWI= 299", "line 301"),
        ("YW?= 300", "line 301"),
        ("AA== 300", "a token twice"),
    ],
)
def test_files_that_are_none_are_refused(folder: Path, line: str, names: str) -> None:
    lines = [*lines_of(make_tokens()[:300]), line, "enp6enp6eg== 301"]
    (folder / "qwen.tiktoken").write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match=f"qwen.tiktoken.*{names}"):
        load_tokenizer(folder)


def test_every_byte_has_to_be_a_token(folder: Path) -> None:
    lines = list(takewhile(lambda line: not line.endswith(" 255"), lines_of(make_tokens())))
    (folder / "qwen.tiktoken").write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match="256 bytes"):
        load_tokenizer(folder)
