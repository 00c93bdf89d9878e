"""Steps begun before the one ahead of them is booked say what steps say that wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from test_engine import collect, make_seq, serve

from blade import CaptureOptions, EngineConfig, Limits, Sampled, Sequence, Step
from blade.contracts import BegunStep
from blade.engine.blocks import BlockPool
from blade.engine.engine import Engine
from blade.engine.overlap import MOST_IN_A_ROW
from blade.engine.runner import ModelRunner
from blade.engine.scheduler import OrderedScheduler
from blade.testing import FakeModel
from blade_native.reference import TorchOps

BLOCK_SIZE = 4
PROMPTS = [[i, *range(i, i * 4)] for i in range(1, 7)]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "top k": {"temperature": 1.5, "top_k": 20},
    "top p of many": {"temperature": 5.0, "top_p": 0.999},  # of more than are looked at first
    "penalties": {"frequency_penalty": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    "bias": {"temperature": 0, "logit_bias": {20: 3.0, 21: 3.5}},
    "min tokens": {"temperature": 0, "min_tokens": 4, "stop_token_ids": tuple(range(0, 260, 2))},
    "processors": {
        "processors": (lambda ids, logits: logits.index_fill_(0, torch.tensor([sum(ids[-2:]) % 260]), 9.0),)
    },
    "logprobs": {"logprobs": 2},
    "stop": {"temperature": 0, "stop_token_ids": tuple(range(0, 260, 40))},
}


class Executor:
    """A runner that overlaps on a CPU, where a step is over at once; counts its steps."""

    def __init__(self, num_blocks: int = 64) -> None:
        model = FakeModel()
        options = CaptureOptions(enabled=False, block_size=BLOCK_SIZE)
        kv = model.allocate(num_blocks, BLOCK_SIZE)
        self.runner = ModelRunner(model, kv, TorchOps(), options, secret=7)
        self.runner.overlaps = True
        self.num_run, self.ahead, self.num_wrong = 0, list[bool](), 0
        self.breaks_at = -1  # the begun step whose results raise

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        self.num_run += 1
        return self.runner.run(step)

    def begin(self, step: Step, after: BegunStep | None = None) -> BegunStep | None:
        begun = self.runner.begin(step, after)  # type: ignore[arg-type]
        if begun is None:
            return None
        self.ahead.append(after is not None)
        plain, number = begun.results, len(self.ahead) - 1

        def results() -> list[list[Sampled] | Exception]:
            if number == self.breaks_at:
                raise RuntimeError("the device is gone")
            found = plain()
            self.num_wrong += len(begun.wrong)
            return found

        begun.results = results  # type: ignore[method-assign]
        return begun

    def forget(self, seq: Sequence) -> None:
        self.runner.forget(seq)

    def close(self) -> None: ...


def make_engine(executor: Executor, num_blocks: int = 64, **config: Any) -> Engine:
    settings = EngineConfig(block_size=BLOCK_SIZE, **{"max_batch_tokens": 16, "max_num_seqs": 8, **config})
    blocks, limits = BlockPool(num_blocks, BLOCK_SIZE), Limits(vocab_size=260, max_context=128, max_num_seqs=8)
    return Engine(executor, OrderedScheduler(blocks, settings), blocks, settings, limits)


def texts(settings: list[dict[str, Any]], executor: Executor, **config: Any) -> list[tuple[list[int], str | None]]:
    """Of all prompts at once, lengths differing."""
    said: list[tuple[list[int], str | None]] = []

    async def scenario(engine: Engine) -> None:
        seqs = [
            make_seq(prompt, **{"max_tokens": 3 + 5 * i, "seed": i} | settings[i % len(settings)])
            for i, prompt in enumerate(PROMPTS)
        ]
        found = await collect(engine, seqs)
        said.extend(found[seq.id][:2] for seq in seqs)
        assert engine.stats().generated_tokens == sum(len(ids) for ids, _ in said)

    serve(make_engine(executor, **config), scenario)
    return said


@pytest.mark.parametrize("name", SETTINGS)
def test_texts_are_the_same(name: str) -> None:
    waiting, overlapping = Executor(), Executor()
    expected = texts([SETTINGS[name]], waiting, disable_overlap=True)
    assert texts([SETTINGS[name]], overlapping) == expected
    assert not waiting.ahead
    if name in ("processors", "logprobs"):  # somebody looks at logits or tokens first
        assert not overlapping.ahead
    else:
        assert sum(overlapping.ahead) > 4
    assert (overlapping.num_wrong > 0) == (name == "top p of many")


def test_those_that_cannot_overlap_hold_the_others_back_while_they_run_and_no_longer() -> None:
    mixed = [SETTINGS["logprobs"] | {"max_tokens": 5}, SETTINGS["plain"]]
    overlapping = Executor()
    assert texts(mixed, overlapping) == texts(mixed, Executor(), disable_overlap=True)
    assert overlapping.num_run > 5
    assert sum(overlapping.ahead) > 10


def test_few_blocks_preempt_as_before() -> None:
    for num_blocks in (14, 20):
        overlapping = Executor(num_blocks)
        found = texts([SETTINGS["plain"]], overlapping, num_blocks=num_blocks)
        assert found == texts([SETTINGS["plain"]], Executor(), disable_overlap=True)


def test_one_that_comes_later_is_let_in_at_once() -> None:
    async def scenario(engine: Engine) -> None:
        first = make_seq([1, 2, 3], max_tokens=100, temperature=0)
        stream = engine.submit([first])
        await anext(aiter(stream))
        found = await collect(engine, [make_seq([4, 5], max_tokens=3, temperature=0)])
        (ids, reason, _) = next(iter(found.values()))
        assert (ids, reason) == (FakeModel().generate([4, 5], 3), "length")
        assert first.finish_reason is None
        stream.abort()

    serve(make_engine(Executor()), scenario)


def test_a_full_batch_goes_ahead_of_those_that_wait_but_not_for_ever() -> None:
    executor = Executor()

    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([i, i + 1], max_tokens=40, temperature=0) for i in range(4)]
        found = await collect(engine, seqs)
        assert all(found[seq.id][0] == FakeModel().generate(seq.prompt_ids, 40) for seq in seqs)

    serve(make_engine(executor, max_num_seqs=2), scenario)
    rows = "".join("a" if ahead else "-" for ahead in executor.ahead)
    assert "a" * MOST_IN_A_ROW + "-" in rows
    assert "a" * 30 in rows  # the last two, whom nobody waits for


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_step_that_breaks_is_run_again(number: int, caplog: pytest.LogCaptureFixture) -> None:
    expected = texts([SETTINGS["greedy"]], Executor(), disable_overlap=True)
    executor = Executor()
    executor.breaks_at = number
    assert texts([SETTINGS["greedy"]], executor) == expected
    assert "the device is gone" in caplog.text


def test_an_abort_leaves_nothing_behind() -> None:
    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([i], max_tokens=100, temperature=0) for i in range(3)]
        streams = [engine.submit([seq]) for seq in seqs]
        for stream in streams:
            await anext(aiter(stream))
            stream.abort()
        while engine.stats().num_running:
            await asyncio.sleep(0.001)

    serve(make_engine(Executor()), scenario)


def test_drawing_first_looks_at_few_and_says_which_were_wrong() -> None:
    runner = Executor().runner
    seq = make_seq([1, 2, 3], temperature=5.0, top_p=0.999, seed=1)
    seq.blocks = [0, 1]
    step = Step([seq], [3])
    (expected,) = runner.run(step)
    begun = runner.begin(step)
    assert begun is not None
    first = int(begun.ids_of([seq], torch.Tensor.clone)[0])
    assert begun.results() == [expected]
    assert isinstance(expected, list)
    assert begun.wrong == (set() if first == expected[0].token_id else {seq.id})


def raises(output_ids: list[int], logits: torch.Tensor) -> None:
    raise RuntimeError("of no concern to others")


def test_a_runner_vouches_for_itself_when_requests_are_bad() -> None:
    executor = Executor()

    async def scenario(engine: Engine) -> None:
        for i in range(4):
            bad = make_seq([i], processors=(raises,))
            assert [end for _, end, _ in (await collect(engine, [bad])).values()] == ["error"]
            assert engine.healthy()
        assert executor.num_run == 4 + 1  # after the third

    serve(make_engine(executor), scenario)
