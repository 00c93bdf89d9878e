"""The strict dialect."""

from .fakes import FakeEngine, chat, complete

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
