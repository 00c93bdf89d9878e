"""Attacks that have felled other servers: each gets a 4xx naming the field, and the next request is served."""

import json
from typing import Any

import pytest

from .fakes import Client, run

DEEP = b"[" * 100_000

FIELDS: list[tuple[dict[str, Any], str]] = [
    # unbounded parameters
    ({"n": 0}, "n"),
    ({"n": 33}, "n"),
    ({"n": 10**12}, "n"),
    ({"best_of": 10**9}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 510}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"prompt": "x" * 600}, "prompt"),
    ({"prompt": ["x"] * 33}, "prompt"),
    ({"prompt": ["x"] * 3000}, "prompt"),
    ({"prompt": ["x"] * 20, "n": 2}, "n"),
    ({"stop": ["x"] * 65}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop_sequences": [1]}, "stop_sequences[0]"),
    ({"stop_tokens": [0] * 257}, "stop_tokens"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"cache_salt": "x" * 129}, "cache_salt"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"priority": 10**9}, "priority"),
    ({"user": "x" * 257}, "user"),
    ({"model": "x" * 257}, "model"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "abc"}, "seed"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    # indices and what is no number
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": [260]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [2**31]}, "prompt[0]"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[1], 2]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"stop_tokens": [260]}, "stop_tokens"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"logit_bias": {"260": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": "nan"}}, "logit_bias"),
    ({"temperature": "nan"}, "temperature"),
    ({"temperature": "inf"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": -1}, "min_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": "nan"}, "repetition_penalty"),
    # code, grammars, URLs, internal fields
    ({"guided_regex": "(a+)+$"}, "guided_regex"),
    ({"guided_json": "{}"}, "guided_json"),
    ({"guided_choice": ["a"]}, "guided_choice"),
    ({"guided_grammar": "root ::= root"}, "guided_grammar"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": "json_object"}, "response_format"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"suffix": "x"}, "suffix"),
    ({"prompt_embeds": "gASVBg=="}, "prompt_embeds"),
    ({"kv_transfer_params": {"remote_host": "10.0.0.1"}}, "kv_transfer_params"),
    ({"logits_processors": {"os.system": "id"}}, "logits_processors"),
    ({"logits_processors": {"broken": 1}}, "logits_processors.broken"),
    ({"echo": True, "logprobs": 1}, "echo"),
]


def broken_processor(arguments: Any, tokenizer: Any) -> Any:
    raise KeyError("/secret/path")


def attacked(client: Client, path: str, body: Any) -> Any:
    async def work() -> Any:
        answer = await client.post(path, body)
        after = await client.complete()
        assert (after.status, after.json["choices"][0]["text"]) == (200, "Hello")
        return answer

    return run(work())


@pytest.mark.parametrize(("fields", "param"), FIELDS, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
def test_a_field_out_of_bounds_is_named(fields: dict[str, Any], param: str, dialect: str) -> None:
    client = Client(dialect=dialect, logits_processors={"broken": broken_processor})
    answer = attacked(client, "/v1/completions", {"prompt": "abc"} | fields)
    assert answer.status == 400
    error = answer.json["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in error["message"]
    assert "/secret" not in error["message"]
    assert len(client.engine.seqs) == 1  # the one afterwards


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        DEEP,
        b'{"prompt": "a", "x": ' + DEEP,
        b'{"prompt": "a", "x": ' + DEEP + b"]" * len(DEEP) + b"}",
        b"\x80\x04\x95.",  # a pickle
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    answer = attacked(Client(), "/v1/completions", body)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]},
            "content[0]",
        ),
        ({"role": "user", "content": [{"type": "text"}] * 3}, "content[0]"),
        ({"role": "tool", "content": "x" * 600}, ""),
    ],
)
def test_a_conversation_cannot_fetch_or_overflow(message: dict[str, Any], param: str) -> None:
    from blade.text.chat_template import ChatTemplate

    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    answer = attacked(Client(chat_template=template), "/v1/chat/completions", {"messages": [message]})
    assert answer.status == 400
    assert param in answer.json["error"]["param"]


def test_an_explosive_template_argument_is_no_argument() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"self": "x"}}
    assert attacked(Client(), "/v1/chat/completions", body).status == 400


def test_tools_nested_too_deeply_fail_alone() -> None:
    from blade.text.chat_template import ChatTemplate

    parameters: dict[str, Any] = {}
    for _ in range(900):
        parameters = {"a": parameters}
    function = {"name": "f", "parameters": parameters}
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": function}]}
    template = ChatTemplate("{{ tools | tojson }}")
    client = Client(chat_template=template, tool_parser=lambda tokenizer: None)
    assert attacked(client, "/v1/chat/completions", json.dumps(body).encode()).status == 400


def test_a_request_id_cannot_forge_log_lines_or_headers() -> None:
    headers = {"x-request-id": "a\r\nset-cookie: b" + "c" * 500}
    answer = run(Client().complete(headers=headers))
    assert answer.headers["x-request-id"] == answer.json["id"]
    assert answer.json["id"] == "aset-cookie:b" + "c" * 115


def test_no_exception_text_reaches_a_client(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(server: Any, request: Any) -> Any:
        raise RuntimeError("secret path /home/x")

    answer = run(Client(routes={"GET /broken": handler}).request("GET", "/broken"))
    assert answer.status == 500
    assert answer.json["error"]["message"] == "The server failed on this request."
    assert "secret path" in caplog.text
