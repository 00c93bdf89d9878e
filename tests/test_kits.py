"""Each kit passes what honours its contract and catches what breaks it."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from blade import Draft, EngineConfig, OrderedScheduler, Sequence, Step
from blade.testing import (
    ByteTokenizer,
    FakeModel,
    check_drafter,
    check_logits_processor,
    check_plugin,
    check_reasoning_parser,
    check_scheduler,
    check_tokenizer,
    check_tool_parser,
)

# ------------------------------------------------------------------------------------------ schedulers


class OverBudget(OrderedScheduler):
    def schedule(self) -> Step:
        self.max_batch_tokens = 10**6
        return super().schedule()


class Greedy(OrderedScheduler):
    def _admit(self, step: Step, budget: int, before: Sequence | None = None) -> int:
        self.max_num_seqs = 10**6
        return super()._admit(step, budget, before)


class Twice(OrderedScheduler):
    def schedule(self) -> Step:
        step = super().schedule()
        return Step(step.seqs * 2, step.num_tokens * 2)


class NoBlocks(OrderedScheduler):
    def _make_room(self, seq: Sequence, num_tokens: int, step: Step) -> bool:
        return True


class Forgetful(OrderedScheduler):
    def remove(self, seq: Sequence) -> None:
        if seq in self.running:
            super().remove(seq)


class Starving(OrderedScheduler):
    def add(self, seq: Sequence) -> None:
        if seq.id != 5:
            super().add(seq)


class KeepsBlocks(OrderedScheduler):
    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.add(seq)


@pytest.mark.parametrize("scheduler", [OverBudget, Greedy, Twice, NoBlocks, Forgetful, Starving, KeepsBlocks])
def test_a_broken_scheduler_is_caught(scheduler: type[OrderedScheduler]) -> None:
    with pytest.raises(AssertionError):
        check_scheduler(scheduler)


# ------------------------------------------------------------------------------------------ drafters, processors


class Repeat:
    """Proposes the last id again."""

    def __init__(self, config: EngineConfig, draft_model: object) -> None: ...

    def propose(self, seqs: Any, limits: Any) -> list[Draft]:
        return [Draft([seq.tokens(0, seq.num_tokens)[-1]] * limit) for seq, limit in zip(seqs, limits, strict=True)]

    def forget(self, seq: Any) -> None: ...


class TooLong(Repeat):
    def propose(self, seqs: Any, limits: Any) -> list[Draft]:
        return super().propose(seqs, [9 for _ in limits])


class TooFew(Repeat):
    def propose(self, seqs: Any, limits: Any) -> list[Draft]:
        return super().propose(seqs, limits)[1:]


class Meddling(Repeat):
    def propose(self, seqs: Any, limits: Any) -> list[Draft]:
        for seq in seqs:
            seq.output_ids.append(1)
        return super().propose(seqs, limits)


class OutOfRange(Repeat):
    def propose(self, seqs: Any, limits: Any) -> list[Draft]:
        return [Draft([1000] * min(1, limit)) for limit in limits]


class PlainLists(Repeat):
    def propose(self, seqs: Any, limits: Any) -> Any:
        return [draft.ids for draft in super().propose(seqs, limits)]


class Fan(Repeat):
    """Trees whose ids all follow the sequence."""

    trees: Any = True
    tree_size = 8

    def propose(self, seqs: Any, limits: Any) -> list[Draft]:
        return [Draft(list(range(limit)), parents=self.parents(limit)) for limit in limits]

    def parents(self, size: int) -> list[int]:
        return [-1] * size

    def sampled(self, seq: Sequence, ids: Any) -> None:
        assert len(ids) == 1 + len(seq.draft_ids)


class Forward(Fan):
    def parents(self, size: int) -> list[int]:
        return list(range(size))


class Unannounced(Fan):
    trees = None


class Cutting(Fan):
    def sampled(self, seq: Sequence, ids: Any) -> None:
        seq.draft_ids = []


def test_a_good_drafter_passes() -> None:
    check_drafter(Repeat)
    check_drafter(Fan)


@pytest.mark.parametrize("drafter", [TooLong, TooFew, Meddling, OutOfRange, PlainLists, Forward, Unannounced, Cutting])
def test_a_broken_drafter_is_caught(drafter: type[Repeat]) -> None:
    with pytest.raises(AssertionError):
        check_drafter(drafter)


def ban(arguments: Any, tokenizer: Any) -> Any:
    def process(output_ids: Any, logits: Any) -> None:
        logits[arguments["ids"]] = -float("inf")

    return process


def test_a_good_logits_processor_passes() -> None:
    check_logits_processor(ban, {"ids": [1, 2]}, ByteTokenizer())


@pytest.mark.parametrize(
    "process",
    [
        lambda output_ids, logits: logits * 2,
        lambda output_ids, logits: logits.fill_(-float("inf")) and None,
        lambda output_ids, logits: logits.mul_(float("nan")) and None,
        lambda output_ids, logits: output_ids.clear(),
    ],
)
def test_a_broken_logits_processor_is_caught(process: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_logits_processor(lambda arguments, tokenizer: process, None, ByteTokenizer())


# ------------------------------------------------------------------------------------------ text


def test_the_byte_tokenizer_passes() -> None:
    check_tokenizer(ByteTokenizer())


class Smuggling(ByteTokenizer):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_template(text)


class Confused(ByteTokenizer):
    def encode_template(self, text: str, literals: Any = None) -> list[int]:
        return super().encode_template(text.translate(str.maketrans(literals or {})))


class Lossy(ByteTokenizer):
    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return super().decode(ids, skip_special_tokens).strip().replace("  ", " ")


class WithSpecials(ByteTokenizer):
    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return super().decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("tokenizer", [Smuggling, Confused, Lossy, WithSpecials])
def test_a_broken_tokenizer_is_caught(tokenizer: type[ByteTokenizer]) -> None:
    with pytest.raises(AssertionError):
        check_tokenizer(tokenizer())


class ThinkParser:
    """Reasoning up to </think>; holds back what may be the beginning of the tag."""

    def __init__(self, tokenizer: Any) -> None:
        self.held, self.thinking = "", True

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        self.held += text
        if not self.thinking:
            return "", self._take(len(self.held))
        before, tag, _ = self.held.partition("</think>")
        if tag:
            self.thinking = False
            reasoning = self._take(len(before))
            self._take(len(tag))
            return reasoning, self._take(len(self.held))
        keep = next((n for n in range(7, 0, -1) if self.held.endswith("</think>"[:n])), 0)
        return self._take(len(self.held) if final else len(self.held) - keep), ""

    def _take(self, num_chars: int) -> str:
        taken, self.held = self.held[:num_chars], self.held[num_chars:]
        return taken


class Impatient(ThinkParser):
    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        return super().push(text, final=True)


REPLIES = ["hm, 1 < 2</think>yes", "never ends </thin", "", "</think>at once"]


def test_a_good_reasoning_parser_gives_its_results() -> None:
    assert check_reasoning_parser(ThinkParser, REPLIES) == [
        ("hm, 1 < 2", "yes"),
        ("never ends </thin", ""),
        ("", ""),
        ("", "at once"),
    ]


def test_a_reasoning_parser_that_splits_a_tag_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"the split of .* matters"):
        check_reasoning_parser(Impatient, REPLIES)


class LineParser:
    """A call is a line like `!name {"a": 1}`."""

    first: ClassVar[dict[str, Any]] = {"type": "function", "id": "call_1"}

    def __init__(self, tokenizer: Any) -> None:
        self.held, self.num_calls = "", 0

    def push(self, text: str, final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        *lines, self.held = (self.held + text + "\n" * final).split("\n")
        shown = "".join(line + "\n" for line in lines if not line.startswith("!"))
        return shown, [self._delta(line) for line in lines if line.startswith("!")]

    def _delta(self, line: str) -> dict[str, Any]:
        name, _, arguments = line[1:].partition(" ")
        self.num_calls += 1
        return {**self.first, "index": self.num_calls - 1, "function": {"name": name, "arguments": arguments}}


class Untyped(LineParser):
    first: ClassVar[dict[str, Any]] = {"id": "call_1"}


class Nameless(LineParser):
    first: ClassVar[dict[str, Any]] = {"type": "function"}


class Misnumbered(LineParser):
    def __init__(self, tokenizer: Any) -> None:
        self.held, self.num_calls = "", 1


class Hasty(LineParser):
    def push(self, text: str, final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        return super().push(text + "\n", final)


CALLS = ['Let me see.\n!add {"a": 1}\n!sub {"b": [2]}\nDone.', "no call", ""]


def test_a_good_tool_parser_gives_its_results() -> None:
    results = check_tool_parser(LineParser, CALLS)
    assert results[0] == ("Let me see.\nDone.\n", [("add", '{"a": 1}'), ("sub", '{"b": [2]}')])
    assert results[1:] == [("no call\n", []), ("\n", [])]


@pytest.mark.parametrize("parser", [Untyped, Nameless, Misnumbered, Hasty])
def test_a_broken_tool_parser_is_caught(parser: type[LineParser]) -> None:
    with pytest.raises(AssertionError):
        check_tool_parser(parser, CALLS)


# ------------------------------------------------------------------------------------------ plugins


@pytest.fixture
def make_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(source: str) -> ModuleType:
        (tmp_path / "kit_plugin.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "kit_plugin", raising=False)
        return __import__("kit_plugin")

    return make


HOOK = "\n@hookimpl\ndef register_schedulers(register):\n    register('mine', OrderedScheduler)\n"


def test_a_good_plugin_passes(make_module: Any) -> None:
    check_plugin(make_module("from blade import OrderedScheduler, hookimpl\n" + HOOK))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1", "implements no hook"),
        (
            "from blade import hookimpl\nfrom blade.engine.scheduler import OrderedScheduler" + HOOK,
            "imports blade.engine",
        ),
        ("from blade import engine, hookimpl, OrderedScheduler" + HOOK, "imports blade.engine"),
        ("import numpy, torch\nfrom blade import hookimpl, OrderedScheduler" + HOOK, "also imports torch"),
    ],
)
def test_a_plugin_outside_the_law_is_caught(make_module: Any, source: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_plugin(make_module(source))


# ------------------------------------------------------------------------------------------ the fake model


def test_the_fake_model_gives_the_same_whatever_the_blocks_and_chunks() -> None:
    torch = pytest.importorskip("torch")
    from blade.engine.batch import build_batch
    from blade.engine.blocks import BlockPool
    from blade.types import SamplingParams

    model = FakeModel()
    pool, kv = BlockPool(16, 4), model.allocate(16, 4)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
    seqs = [Sequence(i, list(prompt), SamplingParams(max_tokens=6)) for i, prompt in enumerate(prompts)]
    while any(len(seq.output_ids) < 6 for seq in seqs):
        step = Step(list(seqs), [min(3, seq.num_owed) for seq in seqs])
        for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True):
            assert pool.grow(seq, num_tokens)
        logits = iter(model.forward(build_batch(step, 4, torch.Tensor.clone), kv))
        for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True):
            seq.computed += num_tokens
            if seq.num_owed == 0:
                seq.output_ids.append(int(next(logits).argmax()))
    assert [seq.output_ids[:6] for seq in seqs] == [model.generate(prompt, 6) for prompt in prompts]


def test_the_fake_model_sees_every_id_at_its_place() -> None:
    continuations = {tuple(FakeModel().generate(prompt, 8)) for prompt in ([1, 2, 3], [1, 3, 2], [2, 3], [0, 1, 2, 3])}
    assert len(continuations) == 4
