from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from blade.testing import ByteTokenizer
from blade.text.detokenizer import Detokenizer
from blade.text.tokenizer import HFTokenizer


def stream(tokenizer: HFTokenizer, pieces: list[list[int]]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([detokenizer.push(piece) for piece in pieces]) + detokenizer.flush()


PIECES = st.lists(st.lists(st.integers(0, 300), max_size=4), max_size=30)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_any_split_gives_what_decode_gives(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: HFTokenizer = request.getfixturevalue(kind)

    @given(PIECES)
    def check(pieces: list[list[int]]) -> None:
        assert stream(tokenizer, pieces) == tokenizer.decode([i for piece in pieces for i in piece])

    check()


@given(text=st.text(), cuts=st.lists(st.integers(0, 50)))
def test_texts_come_back(byte_level: HFTokenizer, text: str, cuts: list[int]) -> None:
    ids = byte_level.encode(text)
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [ids[a:b] for a, b in pairwise(bounds)]
    assert stream(byte_level, pieces) == byte_level.decode(ids)


@given(st.lists(st.integers(0, 275)))
def test_decode_is_the_library_s(byte_level: HFTokenizer, ids: list[int]) -> None:
    library: Tokenizer = byte_level._with_control
    assert byte_level.decode(ids) == library.decode(ids)
    assert byte_level.decode(ids, skip_special_tokens=False) == library.decode(ids, skip_special_tokens=False)


@given(st.text(alphabet="abcdefghint é你🙂"))
def test_sentencepiece_decode_is_the_library_s_on_texts(sentencepiece: HFTokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == sentencepiece._with_control.decode(ids) == text


def test_split_characters_are_held_back(byte_level: HFTokenizer) -> None:
    detokenizer = Detokenizer(byte_level)
    ids = byte_level.encode("🙂")
    assert len(ids) == 4
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_a_character(byte_level: HFTokenizer) -> None:
    detokenizer = Detokenizer(byte_level)
    first, *_ = byte_level.encode("🙂")
    assert detokenizer.push([first]) == ""
    assert detokenizer.push(byte_level.encode("a")) == "\ufffda"
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_byte_fallback_does_not_wait_for_the_run_to_end(sentencepiece: HFTokenizer) -> None:
    detokenizer = Detokenizer(sentencepiece)
    texts = [detokenizer.push([i]) for i in sentencepiece.encode("你好", add_special_tokens=False)]
    assert texts == ["", "", "", "你", "", "", "好"]


def test_leading_space_of_sentencepiece(sentencepiece: HFTokenizer) -> None:
    ids = sentencepiece.encode("the in", add_special_tokens=True)
    assert stream(sentencepiece, [[i] for i in ids]) == "the in"
    going_on = Detokenizer(sentencepiece, continues=True)
    assert going_on.push(ids) + going_on.flush() == " the in"


def test_control_tokens_are_silent(byte_level: HFTokenizer) -> None:
    ids = byte_level.encode_template("<|im_start|>hello<|im_end|>")
    assert stream(byte_level, [ids]) == "hello"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_any_tokenizer_will_do() -> None:
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in tokenizer.encode(" é")] == ["", " ", "", "é"]
