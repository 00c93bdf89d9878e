"""What a request may say, and what the engine is asked for then."""

import threading
from collections.abc import Sequence as Seq
from typing import Any

import pytest

from blade.api.prompts import split_prompt
from blade.errors import RequestError
from blade.types import Limits, SamplingParams

from .fakes import EOS, ByteTokenizer, Client, FakeEngine, complete, run
from .rsgi import Answer


def params(path: str = "complete", **fields: Any) -> SamplingParams:
    client = Client(logits_processors={"loud": lambda arguments, tokenizer: ("loud", arguments)})
    answer: Answer = run(getattr(client, path)(**fields))
    assert answer.status == 200, answer.json
    return client.engine.seqs[0].params


def prompts(prompt: Any, **fields: Any) -> list[list[int]]:
    client = Client()
    assert run(client.complete(prompt=prompt, **fields)).status == 200
    return [seq.prompt_ids for seq in client.engine.seqs]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["7"], [[55]]),
        ("x" * 5000, None),  # long enough for a thread
    ],
)
def test_a_prompt_comes_in_four_forms(prompt: Any, ids: list[list[int]] | None) -> None:
    if ids is None:
        engine = FakeEngine(limits=Limits(260, 6000, 4))
        assert complete(engine, prompt=prompt).status == 200
        assert engine.seqs[0].prompt_ids == [120] * 5000
    else:
        assert prompts(prompt) == ids


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    answer = complete(FakeEngine("ab"), prompt=["x", "yz"], n=2, echo=True)
    assert [(c["index"], c["text"]) for c in answer.json["choices"]] == [
        (0, "xab"),
        (1, "xab"),
        (2, "yzab"),
        (3, "yzab"),
    ]
    assert answer.json["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_a_seed_gives_each_choice_its_own() -> None:
    client = Client()
    run(client.complete(seed=7, n=3))
    assert [seq.params.seed for seq in client.engine.seqs] == [7, 8, 9]


def test_echo_of_ids_is_their_text_and_begins_a_stream() -> None:
    events = complete(FakeEngine("a"), prompt=[120, 121], echo=True, stream=True).events
    assert [event["choices"][0]["text"] for event in events] == ["xya", ""]


class WatchedTokenizer(ByteTokenizer):
    """Remembers what is asked of it, and in which thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls.append(("encode", threading.get_ident()))
        return super().encode(text, add_special_tokens)

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str:
        self.calls.append(("decode", threading.get_ident()))
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [7] * 513},
        {"prompt": [[7] * 513]},
        {"prompt": [7] * 512},
        {"prompt": [7, 260]},
        {"prompt": [7] * 510},  # with max_tokens 16
        {"prompt": [[7]] * 33},
        {"prompt": ["x"] * 33},
        {"prompt": ["x"] * 17, "n": 2},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_what_is_beyond_a_limit_is_neither_encoded_nor_decoded(fields: dict[str, Any]) -> None:
    client = Client(FakeEngine())
    client.server.tokenizer = watched = WatchedTokenizer()
    assert run(client.complete(echo=True, **fields)).status == 400
    assert watched.calls == []


def test_ids_are_decoded_for_an_echo_in_a_thread() -> None:
    client = Client(FakeEngine("a"))
    client.server.tokenizer = watched = WatchedTokenizer()
    answer = run(client.complete(echo=True, prompt=[[120, 121], [122]]))
    assert [choice["text"] for choice in answer.json["choices"]] == ["xya", "za"]
    assert {name for name, _ in watched.calls} == {"decode"}
    assert threading.get_ident() not in {thread for _, thread in watched.calls}


@pytest.mark.parametrize("first", [1, [1], "x"])
def test_a_prompt_with_far_too_many_items_is_not_looked_through(first: Any) -> None:
    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError

    with pytest.raises(RequestError, match="prompt has 3000"):
        split_prompt(Unread([first] * 3000), Limits(260, 2999, 4))


def test_the_defaults() -> None:
    assert params() == SamplingParams(max_tokens=16, stop_token_ids=(EOS,))
    assert params("chat") == SamplingParams(max_tokens=512 - 8, stop_token_ids=(EOS,))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": "12"}, {"max_tokens": 12}),
        ({"max_tokens": 12.0}, {"max_tokens": 12}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": None, "temperature": None, "stop": None}, {}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": "0.5"}, {"temperature": 0.5}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 0}, {"top_p": 1e-9}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": 40}, {"top_k": 40}),
        ({"top_k": 2**31 - 1}, {"top_k": 0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": {5: -100.0, 7: 1.5}}),
        ({"stop_tokens": [3], "stop_token_ids": [4, 3]}, {"stop_token_ids": (3, 4, EOS)}),
        ({"ignore_eos": "true", "stop_tokens": [3]}, {"stop_token_ids": (3,)}),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": "3"}, {"logprobs": 3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}),
        ({"logprobs": False}, {}),
        ({"logits_processors": {"loud": [1]}}, {"processors": (("loud", [1]),)}),
        ({"best_of": 1, "use_beam_search": False, "response_format": "text", "nobody_knows": [{}]}, {}),
        ({"response_format": {"type": "text"}, "guided_json": None, "user": "u", "model": ""}, {}),
    ],
)
def test_fields_become_sampling_params(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    defaults = {"max_tokens": 16, "stop_token_ids": (EOS,)}
    assert params(**fields) == SamplingParams(**(defaults | expected))


@pytest.mark.parametrize(
    ("fields", "expected"), [({"logprobs": 0}, None), ({"logprobs": 2}, 2), ({"logprobs": True}, 0)]
)
def test_chat_takes_logprobs_as_a_flag_or_a_count(fields: dict[str, Any], expected: int | None) -> None:
    assert params("chat", **fields).logprobs == expected


def test_priority_and_salt_reach_the_engine() -> None:
    client = Client()
    for salt in ("a", "b", "a"):
        run(client.complete(cache_salt=salt, priority=-3))
    first, second, third = client.engine.seqs
    assert first.namespace == third.namespace != second.namespace != b""
    assert first.priority == -3


@pytest.mark.parametrize("field", ["stop", "stop_sequences"])
@pytest.mark.parametrize("stop", ["lo W", ["xx", "lo W"]])
def test_a_stop_string_over_several_tokens_ends_the_choice_in_the_engine_too(field: str, stop: Any) -> None:
    client = Client(FakeEngine("Hello World"))
    answer = run(client.complete(**{field: stop}))
    assert answer.json["choices"][0]["text"] == "Hel"
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert answer.json["usage"]["completion_tokens"] == 7
    assert client.engine.aborted == [0]


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    choice = complete(FakeEngine("a.b.c"), stop=".", min_tokens=3).json["choices"][0]
    assert choice["text"] == "a.b"


def test_held_back_text_is_not_lost() -> None:
    assert complete(FakeEngine("Hel"), stop="lo").json["choices"][0]["text"] == "Hel"
    events = complete(FakeEngine("Hel"), stop="lo", stream=True).events
    assert [event["choices"][0]["text"] for event in events] == ["H", "e", "", "l", ""]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["x" * 1024] * 9}, "stop"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty"),
        ({"min_tokens": 2, "stop_tokens": list(range(130)), "stop_token_ids": list(range(130, 260))}, "min_tokens"),
    ],
)
def test_what_would_hurt_the_engine_or_the_loop_is_refused(fields: dict[str, Any], param: str) -> None:
    answer = complete(**fields)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)


LONG = Limits(vocab_size=260, max_context=1 << 18, max_num_seqs=256)


@pytest.mark.parametrize("path", ["complete", "chat"])
@pytest.mark.parametrize("stream", [True, False])
def test_more_log_probabilities_than_a_reply_can_hold_are_refused(path: str, stream: bool) -> None:
    client = Client(FakeEngine(limits=LONG), "openai")
    asked = {"n": 256, "max_tokens": 4096, "ignore_eos": True, "stream": stream}
    top = {"logprobs": 20} if path == "complete" else {"logprobs": True, "top_logprobs": 20}
    answer = run(getattr(client, path)(**asked, **top))
    assert (answer.status, answer.json["error"]["param"]) == (400, "logprobs")
    assert "256 choices of 4096 tokens with 21 log-probabilities each" in answer.json["error"]["message"]
    assert "Ask for less of one of them." in answer.json["error"]["message"]
    assert client.engine.seqs == []


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("complete", {"n": 128, "logprobs": 20}),
        ("complete", {"prompt": ["abc"] * 256, "max_tokens": 1024, "logprobs": 5}),
        ("complete", {"max_tokens": 200_000, "logprobs": 20}),
        ("complete", {"prompt": ["x" * 2000] * 128, "max_tokens": 1, "logprobs": 1}),
        ("complete", {"n": 256, "max_tokens": 100_000}),
        ("chat", {"n": 128, "logprobs": True, "top_logprobs": 20}),
        ("chat", {"n": 8, "max_completion_tokens": 32_768, "logprobs": True, "top_logprobs": 20}),
        ("chat", {"max_tokens": 250_000, "logprobs": True, "top_logprobs": 20}),
    ],
)
def test_what_clients_and_harnesses_ask_for_is_no_such_thing(path: str, fields: dict[str, Any]) -> None:
    client = Client(FakeEngine("Hi", limits=LONG), "openai")
    assert run(getattr(client, path)(**fields)).status == 200
