from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from blade.text.control_guard import ControlGuard

TOKENS = ["<|im_end|>", "<|im_start|>", "<s>", "<<s>>", "[INST]"]
GUARD = ControlGuard(TOKENS)


def restore(text: str, literals: dict[str, str]) -> str:
    return "".join(literals.get(char, char) for char in text)


@pytest.mark.parametrize("text", ["", "hello", "a < b and b > c", "im_end", "user", "end", "1|2", "<b> x </b>\n"])
def test_harmless_strings_are_left_alone(text: str) -> None:
    assert GUARD.protect({"content": text}) == ({"content": text}, {})


def test_harmless_requests_are_not_even_copied() -> None:
    request = [{"content": "hello"}]
    assert GUARD.protect(request)[0] is request


@pytest.mark.parametrize("text", ["<|im_end|>", "x<|im_end|>y", "<<s>>", "a<s>b[INST]", "<|im_<|im_end|>end|>"])
def test_whole_tokens_are_replaced(text: str) -> None:
    safe, literals = GUARD.protect(text)
    assert not any(token in safe for token in TOKENS)
    assert restore(safe, literals) == text


@pytest.mark.parametrize(
    ("before", "text", "after"),
    [
        *(("", "a<|im_", "end|>"), ("<|im_", "end|>b", ""), ("<", "|im_end|>", ""), ("<|", "im_end|", ">")),
        *(("<", "|im_end|", ">"), ("", "<|im_end|", ">"), ("[", "INST", "]"), ("<", "s", ">")),
    ],
)
def test_parts_that_what_is_beside_them_would_complete(before: str, text: str, after: str) -> None:
    safe, literals = GUARD.protect(text)
    assert not any(token in before + safe + after for token in TOKENS)
    assert restore(safe, literals) == text


def test_keys_and_nested_strings_count() -> None:
    value = {"<s>": [{"a": ("<|im_end|>", 1, None)}], "plain": True}
    safe, literals = GUARD.protect(value)
    assert not any(token in repr(safe) for token in TOKENS)
    assert [restore(key, literals) for key in safe] == ["<s>", "plain"]
    assert safe["plain"] is True


def test_stand_ins_are_characters_nobody_uses() -> None:
    _, literals = GUARD.protect("<s>\U00020000", avoid="\U00020001")
    assert literals == {"\U00020002": "<s>"}


@given(
    st.lists(st.sampled_from(["<", "|", "im_end", "im_start", "s", ">", "[", "INST", "]", "x", " ", *TOKENS])),
    st.sampled_from(["", "<", "<|", "<|im_", "x"]),
    st.sampled_from(["", ">", "|>", "end|>", "s>", "x"]),
)
def test_no_token_is_ever_left(parts: list[str], before: str, after: str) -> None:
    text = "".join(parts)
    assume(text not in ("", "im_end", "im_start"))  # plain words: templates write "<|" + role + "|>"
    safe, literals = GUARD.protect(text)
    assert restore(safe, literals) == text
    assert not any(token in before + safe + after for token in TOKENS)


def test_without_control_tokens() -> None:
    assert ControlGuard([]).protect("<s>") == ("<s>", {})
