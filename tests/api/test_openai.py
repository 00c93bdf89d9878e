"""The strict dialect."""

import random
from bisect import bisect_right
from itertools import accumulate

import pytest

from blade.api.logprobs import Offsets, legacy
from blade.types import Sampled, TokenLogprob

from .fakes import EOS, ByteTokenizer, FakeEngine, chat, complete

USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 3,
    "total_tokens": 6,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
}


def hi() -> FakeEngine:
    return FakeEngine("Hi", num_cached=2)


def test_a_whole_completion() -> None:
    answer = complete(hi(), "openai", model="tiny").json
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    choice = {"text": "Hi", "index": 0, "logprobs": None, "finish_reason": "stop"}
    assert answer == {"object": "text_completion", "model": "tiny", "choices": [choice], "usage": USAGE}


def test_a_stream_has_null_reasons_and_no_usage() -> None:
    events = complete(hi(), "openai", stream=True).events
    assert [(e["choices"][0]["text"], e["choices"][0]["finish_reason"]) for e in events] == [
        ("H", None),
        ("i", None),
        ("", "stop"),
    ]
    assert all("usage" not in event and event["created"] == events[0]["created"] for event in events)


def test_usage_comes_in_an_extra_chunk_when_asked_for() -> None:
    events = complete(hi(), "openai", stream=True, stream_options={"include_usage": True}).events
    assert [event["usage"] for event in events] == [None, None, None, USAGE]
    assert events[-1]["choices"] == []


def test_a_chat_stream() -> None:
    events = chat(hi(), "openai", stream=True).events
    assert events[0]["id"].startswith("chatcmpl-")
    assert [e["choices"][0]["delta"] for e in events] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "i"},
        {},
    ]
    assert [e["choices"][0]["finish_reason"] for e in events] == [None, None, None, "stop"]


def test_a_step_that_shows_nothing_sends_nothing() -> None:
    events = complete(FakeEngine("é"), "openai", stream=True).events
    assert [event["choices"][0]["text"] for event in events] == ["é", ""]


def test_a_whole_chat_completion() -> None:
    answer = chat(hi(), "openai").json
    message = {"role": "assistant", "content": "Hi", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]


def test_chat_logprobs() -> None:
    logprobs = chat(hi(), "openai", logprobs=True, top_logprobs=1).json["choices"][0]["logprobs"]
    assert [token["token"] for token in logprobs["content"]] == ["H", "i"]
    assert logprobs["content"][0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}],
    }
    assert logprobs["refusal"] is None


def test_completion_logprobs_have_the_legacy_shape_and_offsets_go_on_through_a_stream() -> None:
    whole = complete(hi(), "openai", logprobs=2).json["choices"][0]["logprobs"]
    assert whole == {
        "tokens": ["H", "i"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"i": -0.5, "j": -1.5}],
        "text_offset": [0, 1],
    }
    events = complete(hi(), "openai", logprobs=2, stream=True).events
    assert [e["choices"][0]["logprobs"]["text_offset"] for e in events[:-1]] == [[0], [1]]
    assert events[-1]["choices"][0]["logprobs"] is None


def test_completion_logprobs_spell_parts_of_characters_and_offsets_are_those_of_the_text() -> None:
    choice = complete(FakeEngine("aé€b"), "openai", logprobs=1).json["choices"][0]
    assert choice["text"] == "aé€b"
    logprobs = choice["logprobs"]
    spelt = ["a", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert logprobs["tokens"] == spelt
    assert [list(top) for top in logprobs["top_logprobs"]] == [[token] for token in spelt]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 3]
    events = complete(FakeEngine("aé€b"), "openai", logprobs=1, stream=True).events[:-1]
    assert "".join(e["choices"][0]["text"] for e in events) == "aé€b"
    assert [e["choices"][0]["logprobs"]["text_offset"] for e in events] == [[0], [1], [1], [2], [2], [2], [3]]


def test_of_tokens_that_are_spelt_alike_the_most_likely_is_told() -> None:
    top = complete(FakeEngine("é"), "openai", logprobs=20).json["choices"][0]["logprobs"]["top_logprobs"][0]
    assert top == {f"bytes:\\x{0xC3 + k:02x}": -0.5 - k for k in range(20)}
    sampled = [Sampled(65, -0.1, (TokenLogprob(65, -0.1), TokenLogprob(EOS, -2.0), TokenLogprob(EOS + 1, -3.0)))]
    assert legacy(sampled, ByteTokenizer(), Offsets()).top_logprobs == [{"A": -0.1, "": -2.0}]


@pytest.mark.parametrize("seed", range(8))
def test_offsets_are_right_for_any_bytes(seed: int) -> None:
    """Tokens cut anywhere, of bytes that may be no UTF-8: each has the place of the character its first byte is of."""
    draw = random.Random(seed)
    alphabet = [b"a", b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\xff", "é€😀\ufffd".encode()]
    pieces = [b"".join(draw.choices(alphabet, k=draw.randrange(4))) for _ in range(60)]
    places = list(accumulate(map(len, pieces), initial=0))
    starts = starts_of_characters(b"".join(pieces))
    offsets = Offsets()
    for piece, place in zip(pieces, places, strict=False):
        offset = offsets.push(piece)
        assert offset == bisect_right(starts, place) - 1 or not piece


def starts_of_characters(data: bytes) -> list[int]:
    """In bytes, of each character of `data.decode(errors="replace")`."""
    starts, begin = [], 0
    while begin < len(data):
        end, num_bad = len(data), 0
        try:
            data[begin:].decode()
        except UnicodeDecodeError as error:
            end, num_bad = begin + error.start, error.end - error.start
        starts += [i for i in range(begin, end) if data[i] & 0xC0 != 0x80]
        starts += [end] if num_bad else []
        begin = end + num_bad
    assert len(starts) == len(data.decode(errors="replace"))
    return starts


def test_an_error_names_param_and_code() -> None:
    answer = complete(dialect="openai", model="gpt-9")
    assert answer.status == 404
    assert answer.json == {
        "error": {
            "message": "The model 'gpt-9' is not served here; 'tiny' is.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_an_engine_error_in_a_stream_is_an_error_event() -> None:
    events = complete(FakeEngine("Hello", fail_at=2), "openai", stream=True).events
    assert events[-1] == {
        "error": {
            "message": "The server failed on this request.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    assert complete(FakeEngine("Hello", fail_at=2), "openai").status == 500
