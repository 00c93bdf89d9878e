"""Tokenizers whose files have rules of their own: encoded elsewhere, to the same ids, stopped where they take long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from blade.errors import CheckpointError, RequestError
from blade.testing import check_tokenizer
from blade.text.pretokenizers import PRETOKENIZERS
from blade.text.tokenizer import HFTokenizer, load_tokenizer
from blade.text.tokenizer_process import ProcessTokenizer
from blade.text.usual_tokenizers import is_usual

from .test_tokenizer_files import tiny, write

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> Tokenizer:
    tokenizer = tiny()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])
    return tokenizer


def replacing(old: Any, new: str) -> Tokenizer:
    tokenizer = tiny()
    tokenizer.normalizer = normalizers.Replace(old, new)
    return tokenizer


def loaded(folder: Path, tokenizer: Tokenizer) -> HFTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config={"eos_token": "<|im_end|>", "bos_token": "<s>", "add_bos_token": True})
    return load_tokenizer(folder)


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_what_models_have_is_usual(pre: str) -> None:
    tokenizer = tiny()
    tokenizer.pre_tokenizer = PRETOKENIZERS[pre].build()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert is_usual(json.loads(tokenizer.to_str()))


@pytest.mark.parametrize(
    "tokenizer",
    [
        split("a+a+b"),
        split(r"[a-z]+\s"),
        replacing("a", "a" * 100),
        replacing(Regex("a+"), ""),
        replacing("", "x"),
    ],
)
def test_what_only_this_file_has_is_not(tokenizer: Tokenizer) -> None:
    assert not is_usual(json.loads(tokenizer.to_str()))


def test_elsewhere_it_is_the_same_tokenizer(tmp_path: Path) -> None:
    plain = split(r"\s?[a-z]{2,}|.")
    ours = loaded(tmp_path, plain)
    assert isinstance(ours, ProcessTokenizer)
    check_tokenizer(ours)
    here = HFTokenizer(plain, ours.eos_token_ids, "<s>")
    text = "hello, wörld <|im_end|> 12\n"
    assert ours.encode(text) == [ours.control_tokens["<s>"], *here.encode(text, False)]
    assert ours.encode_template(text + "X", {"X": "<s>"}) == here.encode_template(text + "X", {"X": "<s>"})
    with pytest.raises(RequestError, match="surrogate"):
        ours.encode("\ud83d")


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (split("a+a+b"), "a" * 20_000),  # the cube of the text
        (split("(a+)+b"), "a" * 60),  # the library panics
        (replacing("a", "a" * 1_000_000), "a" * 20_000),  # 20 GB
    ],
    ids=["slow", "panic", "memory"],
)
def test_a_text_that_is_too_much_is_refused_and_the_next_one_served(
    tmp_path: Path, tokenizer: Tokenizer, text: str
) -> None:
    ours = loaded(tmp_path, tokenizer)
    with pytest.raises(RequestError, match="too much for the model's tokenizer"):
        ours.encode(text)
    assert ours.decode(ours.encode("bcd", add_special_tokens=False)) == "bcd"


def test_a_greeting_that_is_too_much_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"so much as a greeting.*--tokenizer-dir"):
        loaded(tmp_path, replacing("l", "l" * 100_000_000))
