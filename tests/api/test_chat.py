"""Conversations: messages to the template, tools and reasoning out of the reply."""

import asyncio
import threading
from typing import Any

import pytest

from .fakes import ByteTokenizer, Client, FakeEngine, FakeTemplate, chat, run

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


class Tools:
    """Calls look like `<add:ARGUMENTS>`, arguments streamed."""

    def __init__(self, tokenizer: Any) -> None:
        self._inside = False

    def push(self, text: str, final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        shown, calls = "", []
        for char in text:
            if char == "<":
                self._inside = True
                calls.append({"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}})
            elif char == ">":
                self._inside = False
            elif self._inside:
                calls.append({"index": 0, "function": {"arguments": char}})
            else:
                shown += char
        return shown, calls


class Reasoning:
    """Everything before `|` is thought."""

    def __init__(self, tokenizer: Any) -> None:
        self._thinking = True

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        if not self._thinking:
            return "", text
        thought, bar, answer = text.partition("|")
        self._thinking = not bar
        return thought, answer


def rendered(**fields: Any) -> dict[str, Any]:
    client = Client(tool_parser=Tools)
    answer = run(client.chat(**fields))
    assert answer.status == 200, answer.json
    call: dict[str, Any] = client.template.calls[0]
    return call


def test_messages_reach_the_template_in_its_own_terms() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    call = rendered(messages=messages)
    arguments = {"name": "add", "arguments": {"a": 1}}
    assert call["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "c1", "function": arguments}]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    assert (call["tools"], call["add_generation_prompt"]) == (None, True)


def test_template_arguments_are_passed() -> None:
    assert rendered(chat_template_kwargs={"enable_thinking": False})["enable_thinking"] is False
    assert "enable_thinking" not in rendered()


def test_tools_are_shown_to_the_template_unless_none_are_chosen() -> None:
    assert rendered(tools=[TOOL])["tools"] == [TOOL]
    assert rendered(tools=[TOOL], tool_choice="none")["tools"] is None


def test_an_interrupted_reply_goes_on_after_the_template() -> None:
    client = Client(FakeEngine("rest"))
    answer = run(client.chat(resume_response="begun "))
    assert bytes(client.engine.seqs[0].prompt_ids) == b"user:hi|begun "
    assert answer.json["choices"][0]["message"]["content"] == "rest"


@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
def test_tool_calls_are_taken_out_of_the_reply(dialect: str) -> None:
    def ask(**fields: Any) -> Any:
        return run(Client(FakeEngine('ok<{"a":1}>'), dialect, tool_parser=Tools).chat(tools=[TOOL], **fields))

    function = {"name": "add", "arguments": '{"a":1}'}
    choice = ask().json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "ok"
    assert choice["message"]["tool_calls"] == [{"id": "c1", "type": "function", "function": function}]
    deltas = [event["choices"][0]["delta"] for event in ask(stream=True).events]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a":1}'


def test_without_tools_the_parser_stays_out() -> None:
    answer = run(Client(FakeEngine("<x>"), tool_parser=Tools).chat())
    assert answer.json["choices"][0]["message"] == {"role": "assistant", "content": "<x>"}


@pytest.mark.parametrize("dialect", ["bladellm", "openai"])
def test_reasoning_has_a_field_of_its_own(dialect: str) -> None:
    def ask(**fields: Any) -> Any:
        return run(Client(FakeEngine("hm|yes"), dialect, reasoning_parser=Reasoning).chat(**fields))

    message = ask().json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    deltas = [event["choices"][0]["delta"] for event in ask(stream=True).events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools": [TOOL]}, "tools", "--tool-parser"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "not supported"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "retrieval"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Field required"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "king"),
        ({"messages": [{"content": ""}]}, "messages[0].role", "Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text", ""),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "--chat-template"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs", "messages"),
        ({"chat_template_kwargs": {"enable_thinking": [1]}}, "chat_template_kwargs[...]", "boolean"),
    ],
)
def test_what_a_conversation_may_not_say(fields: dict[str, Any], param: str, said: str) -> None:
    answer = run(Client().chat(**fields))
    assert answer.status == 400
    assert answer.json["error"]["param"] == param
    assert said in answer.json["error"]["message"]


@pytest.mark.parametrize("arguments", ["{", "[1]", "[" * 5000])
def test_arguments_of_a_past_call_have_to_be_an_object(arguments: str) -> None:
    call = CALL | {"function": {"name": "add", "arguments": arguments}}
    answer = run(Client().chat(messages=[{"role": "assistant", "tool_calls": [call]}]))
    assert answer.json["error"]["param"] == "messages[0].tool_calls[0].function.arguments"


def test_a_model_without_a_template_says_what_to_do() -> None:
    answer = run(Client(chat_template=None).chat())
    assert (answer.status, answer.json["error"]["param"]) == (400, "messages")
    assert "--chat-template" in answer.json["error"]["message"]


@pytest.mark.parametrize("content", ["abc", [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]])
def test_a_prediction_goes_along_with_every_choice(content: Any) -> None:
    client = Client()
    answer = run(client.chat(prediction={"type": "content", "content": content}, n=2))
    assert answer.status == 200
    assert [seq.prediction_ids for seq in client.engine.seqs] == [[*b"abc"]] * 2


@pytest.mark.parametrize("prediction", [{"type": "content"}, {"type": "x", "content": "a"}, "abc"])
def test_a_malformed_prediction_is_refused(prediction: Any) -> None:
    assert chat(prediction=prediction).status == 400
    long = chat(prediction={"type": "content", "content": "a" * 600})
    assert (long.status, long.json["error"]["param"]) == (400, "prediction")


class SlowTemplate(FakeTemplate):
    """Renders for as long as it takes until `done`; a second at most."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.done, self.waited = threading.Event(), threading.Event(), False

    def render_ids(self, tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        self.begun.set()
        self.waited = self.done.wait(1)
        return super().render_ids(tokenizer, messages, **kwargs)


def test_a_slow_template_delays_no_other_stream() -> None:
    async def work() -> None:
        template = SlowTemplate()
        client = Client(FakeEngine("x" * 50, pace=0.001), chat_template=template)
        slow = asyncio.create_task(client.chat())
        while not template.begun.is_set():
            await asyncio.sleep(0.001)
        other = await client.complete(max_tokens=50, stream=True)
        assert len(other.events) >= 50
        template.done.set()
        assert (await slow).status == 200
        assert template.waited

    run(work())


class SlowTokenizer(ByteTokenizer):
    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.threads.append(threading.current_thread())
        return super().encode(text)


def test_nothing_waits_for_a_tokenizer() -> None:
    """Short texts may take long too, where strangers wrote the tokenizer."""

    async def work() -> None:
        client = Client()
        client.server.tokenizer = tokenizer = SlowTokenizer()
        await client.complete(prompt="x")
        await client.chat(prediction={"type": "content", "content": "x"})
        assert len(tokenizer.threads) == 3
        assert threading.current_thread() not in tokenizer.threads

    run(work())
