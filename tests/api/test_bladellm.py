"""The default dialect, frame by frame."""

import pytest

from .fakes import FakeEngine, chat, complete


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chunk(text: str, count: int, reason: str = "") -> dict[str, object]:
    return {
        "id": "r1",
        "choices": [{"finish_reason": reason, "index": 0, "logprobs": None, "text": text}],
        "object": "text_completion",
        "usage": usage(3, count),
        "error_info": None,
        "model": "",
    }


def test_a_stream_is_framed_as_the_quick_start_shows() -> None:
    answer = complete(FakeEngine("Hi!"), stream="true", headers={"x-dashscope-requestid": "r1"})
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.events == [chunk("H", 1), chunk("i", 2), chunk("!", 3), chunk("", 4, "stop")]
    assert answer.body.startswith(
        b'data: {"id":"r1","choices":[{"finish_reason":"","index":0,"logprobs":null,"text":"H"}],'
    )


def test_a_whole_completion() -> None:
    answer = complete(FakeEngine("Hi!"), model="tiny", headers={"x-request-id": "r1"})
    assert answer.json == chunk("Hi!", 4, "stop") | {"model": "tiny"}


def test_the_default_length_of_a_completion_is_16() -> None:
    answer = complete(FakeEngine("abcdefghijklmnopqrst"), stream=True)
    assert len(answer.events) == 16
    assert answer.events[-1]["choices"][0] == {"finish_reason": "length", "index": 0, "logprobs": None, "text": "p"}


def test_several_tokens_of_one_step_share_a_chunk_but_the_end_has_its_own() -> None:
    events = complete(FakeEngine("Hi!", tokens_per_step=8), stream=True).events
    assert [(e["choices"][0]["text"], e["choices"][0]["finish_reason"]) for e in events] == [("Hi!", ""), ("", "stop")]
    assert [e["usage"]["completion_tokens"] for e in events] == [3, 4]


def test_a_character_over_several_tokens_counts_before_it_shows() -> None:
    events = complete(FakeEngine("é"), stream=True).events
    assert [e["choices"][0]["text"] for e in events] == ["", "é", ""]
    assert [e["usage"]["completion_tokens"] for e in events] == [1, 2, 3]


def test_a_chat_stream_begins_with_the_role() -> None:
    events = chat(FakeEngine("Hi"), stream=True).events
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "H"}, {"content": "i"}, {"content": ""}]
    assert [e["choices"][0]["finish_reason"] for e in events] == ["", "", "", "stop"]
    assert [e["usage"]["completion_tokens"] for e in events] == [1, 1, 2, 3]


def test_a_whole_chat_completion() -> None:
    answer = chat(FakeEngine("Hi")).json
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "Hi"}
    assert answer["choices"] == [{"finish_reason": "stop", "index": 0, "logprobs": None, "message": message}]
    assert answer["usage"] == usage(8, 3)


@pytest.mark.parametrize("ask", [complete, chat])
def test_logprobs_have_one_shape_in_both_endpoints(ask: type[complete]) -> None:
    choice = ask(FakeEngine("H"), logprobs="true", top_logprobs=1).json["choices"][0]
    top = {"token": "H", "logprob": -0.5, "bytes": [72], "id": 72, "is_special": False}
    first, end = choice["logprobs"]["content"]
    assert first == top | {"top_logprobs": [top]}
    assert (end["id"], end["token"], end["is_special"]) == (256, "", True)


def test_errors_carry_both_shapes() -> None:
    answer = complete(stop=[1])
    assert answer.status == 400
    message = "Invalid request: stop[0]: Input should be a valid string, got integer."
    error = {"message": message, "type": "invalid_request_error", "param": "stop[0]", "code": None}
    assert answer.json == {"error": error, "error_info": {"code": 400, "message": message}}


def test_an_engine_error_gives_a_normal_body_with_error_info() -> None:
    answer = complete(FakeEngine("Hello", fail_at=2))
    assert answer.status == 500
    assert answer.json["choices"][0] == {"finish_reason": "error", "index": 0, "logprobs": None, "text": "He"}
    assert answer.json["error_info"] == {"code": 500, "message": "The server failed on this request."}


def test_an_engine_error_in_a_stream_gives_a_last_chunk_with_error_info() -> None:
    events = complete(FakeEngine("Hello", fail_at=2), stream=True).events
    assert [e["error_info"] for e in events[:-1]] == [None, None]
    assert events[-1]["error_info"] == {"code": 500, "message": "The server failed on this request."}
    assert events[-1]["choices"][0]["finish_reason"] == "error"
