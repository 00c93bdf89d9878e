"""The engine thread end to end, with a runner whose next token is a plain function of the tokens before it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from blade import Draft, EngineConfig, Limits, Overloaded, RequestError, Sampled, SamplingParams, Sequence, Step
from blade.engine.blocks import BlockPool
from blade.engine.drafting import GuardedDrafter
from blade.engine.engine import Engine
from blade.engine.scheduler import OrderedScheduler
from blade.engine.speculation import Speculator
from blade.engine.verify import accept

VOCAB = 97
POISON = 96  # a prompt with this id makes every step it is in raise
SOUR = 95  # a prompt with this id makes its own row fail
counter = itertools.count()


def next_token(tokens: list[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 1_000_003
    return value % 90


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeExecutor:
    """Samples with next_token; `seconds` is how long a step takes."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.steps: list[list[int]] = []
        self.closed = False

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        time.sleep(self.seconds)
        self.steps.append(list(step.num_tokens))
        if any(POISON in seq.prompt_ids for seq in step.seqs):
            raise ValueError("poisoned")
        return [self._sample(seq, n) for seq, n in zip(step.seqs, step.num_tokens, strict=True)]

    def _sample(self, seq: Sequence, num_tokens: int) -> list[Sampled] | Exception:
        if SOUR in seq.prompt_ids:
            return ValueError("sour")
        if num_tokens < seq.num_owed:
            return []
        first = seq.num_tokens - len(seq.draft_ids)
        rows = [Sampled(next_token(seq.tokens(0, end))) for end in range(first, seq.num_tokens + 1)]
        return accept(seq.draft_ids, rows)

    def forget(self, seq: Sequence) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def make_seq(prompt: list[int], max_tokens: int = 8, **params: Any) -> Sequence:
    return Sequence(next(counter), prompt, SamplingParams(max_tokens=max_tokens, **params))


def make_engine(executor: FakeExecutor, num_blocks: int = 64, drafter: Any = None, **config: Any) -> Engine:
    settings = EngineConfig(block_size=4, **{"max_batch_tokens": 16, "max_num_seqs": 8, **config})
    blocks = BlockPool(num_blocks, 4)
    limits = Limits(vocab_size=VOCAB, max_context=128, max_num_seqs=8)
    speculator = None
    if drafter is not None:
        speculator = Speculator([GuardedDrafter("test", drafter, VOCAB)], None, 4, limits.max_context)
    return Engine(executor, OrderedScheduler(blocks, settings), blocks, settings, limits, speculator)


def serve(engine: Engine, scenario: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
    """Run the scenario against the started engine, stop it, and check that nothing is left behind."""

    async def main() -> None:
        engine.start(asyncio.get_running_loop())
        try:
            await asyncio.wait_for(scenario(engine), 20)
        finally:
            engine.stop()
            assert await asyncio.to_thread(engine.join, 5)
        await asyncio.sleep(0)

    asyncio.run(main())
    engine.blocks.check()
    assert engine.blocks.num_used == 0
    assert engine._seqs == {}
    assert engine._streams == {}


async def collect(engine: Engine, seqs: list[Sequence]) -> dict[int, tuple[list[int], str | None, Exception | None]]:
    """For each sequence: its ids, how it ended, its error."""
    found: dict[int, tuple[list[int], str | None, Exception | None]] = {seq.id: ([], None, None) for seq in seqs}
    async for outputs in engine.submit(seqs):
        for output in outputs:
            ids = found[output.seq_id][0] + [token.token_id for token in output.sampled]
            found[output.seq_id] = (ids, output.finish_reason, output.error)
    return found


async def ends(engine: Engine, seqs: list[Sequence]) -> list[str | None]:
    return [reason for _, reason, _ in (await collect(engine, seqs)).values()]


def test_many_prompts_each_get_their_own_tokens() -> None:
    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([i, *range(i, i * 5)], max_tokens=5 + i) for i in range(1, 12)]
        found = await collect(engine, seqs)
        for seq in seqs:
            assert found[seq.id] == (expected(seq.prompt_ids, seq.params.max_tokens), "length", None)
        assert engine.stats().generated_tokens == sum(seq.params.max_tokens for seq in seqs)
        assert engine.stats().prompt_tokens == sum(len(seq.prompt_ids) for seq in seqs)

    executor = FakeExecutor()
    serve(make_engine(executor), scenario)
    assert executor.closed
    assert max(sum(step) for step in executor.steps) <= 16


def test_too_few_blocks_preempt_and_lose_nothing() -> None:
    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([i] * 6, max_tokens=30) for i in range(6)]
        found = await collect(engine, seqs)
        assert all(found[seq.id][0] == expected(seq.prompt_ids, 30) for seq in seqs)
        assert engine.stats().preemptions > 0

    serve(make_engine(FakeExecutor(), num_blocks=14), scenario)


def test_who_was_submitted_first_comes_first_however_long_a_prompt_took_to_make() -> None:
    async def scenario(engine: Engine) -> None:
        running, late = make_seq([1] * 6, max_tokens=30), make_seq([2] * 24)
        late.arrival = running.arrival - 1
        task = asyncio.create_task(collect(engine, [running]))
        await asyncio.sleep(0.03)
        assert await ends(engine, [late]) == ["length"]
        assert (await task)[running.id][0] == expected([1] * 6, 30)
        assert running.num_preemptions == 0

    serve(make_engine(FakeExecutor(0.004), num_blocks=9), scenario)


def test_stop_tokens_end_it_and_are_delivered_and_min_tokens_holds_them_back() -> None:
    ids = expected([1, 2, 3], 8)
    stop = ids[2]

    async def scenario(engine: Engine) -> None:
        plain, held = (
            make_seq([1, 2, 3], stop_token_ids=(stop,)),
            make_seq([1, 2, 3], stop_token_ids=(stop,), min_tokens=5),
        )
        found = await collect(engine, [plain, held])
        assert found[plain.id] == (ids[:3], "stop", None)
        assert len(found[held.id][0]) > 5

    serve(make_engine(FakeExecutor()), scenario)


def test_one_that_fails_alone_or_breaks_the_step_hurts_nobody_else() -> None:
    async def scenario(engine: Engine) -> None:
        good, poisoned, sour = make_seq([1, 2, 3]), make_seq([POISON]), make_seq([SOUR])
        found = await collect(engine, [good, poisoned, sour])
        assert found[good.id] == (expected([1, 2, 3], 8), "length", None)
        assert found[poisoned.id][1] == found[sour.id][1] == "error"
        assert "sour" in str(found[sour.id][2])
        again = make_seq([4])
        assert (await collect(engine, [again]))[again.id][0] == expected([4], 8)
        assert engine.healthy()

    serve(make_engine(FakeExecutor()), scenario)


def test_an_aborted_sequence_stops_within_a_step_and_keeps_its_prefix() -> None:
    async def scenario(engine: Engine) -> None:
        seq = make_seq(list(range(12)), max_tokens=100)
        stream = engine.submit([seq])
        async for _ in stream:
            stream.abort()
        await asyncio.sleep(0.02)
        follower = make_seq(list(range(12)))
        await collect(engine, [follower])
        assert len(seq.output_ids) < 10
        assert follower.num_cached == 8

    serve(make_engine(FakeExecutor(0.002)), scenario)


def test_aborting_one_choice_leaves_the_others() -> None:
    async def scenario(engine: Engine) -> None:
        first, second = make_seq([1], max_tokens=30), make_seq([2], max_tokens=30)
        stream = engine.submit([first, second])
        ids: list[int] = []
        async for outputs in stream:
            stream.abort(first.id)
            ids += [token.token_id for output in outputs if output.seq_id == second.id for token in output.sampled]
        assert ids == expected([2], 30)

    serve(make_engine(FakeExecutor(0.001)), scenario)


def test_a_full_queue_refuses_all_or_none() -> None:
    async def scenario(engine: Engine) -> None:
        running = asyncio.create_task(collect(engine, [make_seq([1], max_tokens=40)]))
        await asyncio.sleep(0.05)
        stream = engine.submit([make_seq([2]), make_seq([3])])
        with pytest.raises(Overloaded) as refused:
            engine.submit([make_seq([4])])
        assert refused.value.status == 429
        async for _ in stream:
            pass
        await running

    serve(make_engine(FakeExecutor(0.005), max_num_seqs=1, max_queue_size=2), scenario)


def test_who_waits_too_long_is_told() -> None:
    async def scenario(engine: Engine) -> None:
        running, late = make_seq([1], max_tokens=40), make_seq([2])
        found = await collect(engine, [running, late])
        assert found[running.id][1] == "length"
        error = found[late.id][2]
        assert isinstance(error, Overloaded)
        assert error.status == 503

    serve(make_engine(FakeExecutor(0.005), max_num_seqs=1, max_queue_time=0.02), scenario)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    async def scenario(engine: Engine) -> None:
        with pytest.raises(RequestError, match=r"need 108 tokens.*at most 64"):
            engine.submit([make_seq([1] * 100)])

    serve(make_engine(FakeExecutor(), num_blocks=16), scenario)


def test_stopping_ends_everybody_with_abort() -> None:
    async def scenario(engine: Engine) -> None:
        seq = make_seq([1], max_tokens=100)
        task = asyncio.create_task(collect(engine, [seq]))
        await asyncio.sleep(0.03)
        engine.stop()
        assert (await task)[seq.id][1] == "abort"
        assert await asyncio.to_thread(engine.join, 5)
        with pytest.raises(Overloaded):
            engine.submit([make_seq([1])])
        assert not engine.healthy()

    serve(make_engine(FakeExecutor(0.002)), scenario)


def test_a_stalled_step_makes_it_unhealthy_and_shows_where_it_hangs(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(engine: Engine) -> None:
        task = asyncio.create_task(collect(engine, [make_seq([1], max_tokens=1)]))
        await asyncio.sleep(0.2)
        assert engine.healthy()
        await asyncio.sleep(1.0)
        assert not engine.healthy()
        assert not engine.healthy()
        await task
        assert engine.healthy()

    serve(make_engine(FakeExecutor(1.5), stall_seconds=1), scenario)
    assert capfd.readouterr().err.count("test_engine.py") >= 1


class BrokenExecutor(FakeExecutor):
    """Fails whatever it is given while it is broken; `raises`: the step as a whole, else each of its rows."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.broken, self.raises = True, raises

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        if not self.broken:
            return super().run(step)
        if self.raises:
            raise RuntimeError("an illegal memory access was encountered")
        return [RuntimeError("no token to sample") for _ in step.seqs]


@pytest.mark.parametrize("raises", [True, False])
def test_an_executor_that_fails_every_step_makes_it_unhealthy_until_one_succeeds(raises: bool) -> None:
    executor = BrokenExecutor(raises)

    async def scenario(engine: Engine) -> None:
        for num_failed in range(1, 6):
            assert (await ends(engine, [make_seq([1, 2]), make_seq([3])])) == ["error", "error"]
            assert engine.healthy() == (num_failed < 3)
            assert engine.stats().steps_failed == num_failed
        executor.broken = False
        assert await ends(engine, [make_seq([1, 2])]) == ["length"]
        assert engine.healthy()
        assert engine.stats().steps_failed == 5

    serve(make_engine(executor), scenario)


@pytest.mark.parametrize("fault", [POISON, SOUR])
def test_bad_requests_alone_never_make_it_unhealthy(fault: int) -> None:
    async def scenario(engine: Engine) -> None:
        for i in range(10):
            assert await ends(engine, [make_seq([i, fault])]) == ["error"]
            assert engine.healthy()
        assert engine.stats().steps_failed == 10
        assert engine.stats().blocks_used == 0

    serve(make_engine(FakeExecutor(), num_blocks=3), scenario)


def test_a_few_steps_that_fail_are_no_matter() -> None:
    executor = BrokenExecutor(raises=True)

    async def scenario(engine: Engine) -> None:
        for i in range(8):
            executor.broken = i % 3 < 2
            await ends(engine, [make_seq([i], max_tokens=1)])
            assert engine.healthy()
        assert engine.stats().steps_failed == 6

    serve(make_engine(executor), scenario)


class Oracle:
    """Drafts the right tokens for even prompts, wrong ones in between."""

    def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
        drafts = []
        for seq, limit in zip(seqs, limits, strict=True):
            draft = expected(seq.tokens(0, seq.num_tokens), limit)
            if seq.num_tokens % 2 == 0 and limit > 1:
                draft[1] = (draft[1] + 1) % 90
            drafts.append(Draft(draft))
        return drafts

    def forget(self, seq: Sequence) -> None: ...


def test_drafts_change_the_number_of_steps_and_nothing_else() -> None:
    stop = expected([3] * 5, 20)[17]

    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([i] * 5, max_tokens=20 + i, stop_token_ids=(stop,)) for i in range(1, 6)]
        found = await collect(engine, seqs)
        for seq in seqs:
            ids = expected(seq.prompt_ids, seq.params.max_tokens)
            ids = ids[: ids.index(stop) + 1] if stop in ids else ids
            assert found[seq.id][0] == ids
            again = make_seq([*seq.prompt_ids, *ids, 1])  # its prefix, found in the cache, must be the true one
            assert (await collect(engine, [again]))[again.id][0] == expected(again.prompt_ids, 8)
            assert again.num_cached >= 8
        assert engine.stats().draft_tokens > engine.stats().draft_tokens_accepted > 0

    executor = FakeExecutor()
    serve(make_engine(executor, drafter=Oracle(), max_batch_tokens=64), scenario)
    assert len(executor.steps) < 60


class BrokenDrafter:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def propose(self, seqs: list[Sequence], limits: list[int]) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def forget(self, seq: Sequence) -> None:
        raise ValueError("I forget nothing")


WRONG: list[Any] = [ValueError("no idea"), [], [None], [Draft(["x"])], None, [Draft([1] * 99)]]  # type: ignore[list-item]


@pytest.mark.parametrize("answer", WRONG)
def test_a_broken_drafter_is_done_without(answer: Any) -> None:
    async def scenario(engine: Engine) -> None:
        seq = make_seq([1, 2, 3])
        assert engine.speculator is not None
        assert [drafter.enabled for drafter in engine.speculator.stats] == [True]
        assert (await collect(engine, [seq]))[seq.id][0] == expected([1, 2, 3], 8)
        assert [drafter.enabled for drafter in engine.stats().drafters] == [False]

    serve(make_engine(FakeExecutor(), drafter=BrokenDrafter(answer)), scenario)


class Panic(BaseException):
    """As Rust code in Python raises it."""


class Unreadable:
    def __len__(self) -> int:
        raise Panic


class FatalScheduler(OrderedScheduler):
    """Breaks the engine thread, slowly enough for others to submit meanwhile."""

    error: BaseException
    for_good: bool  # nothing of it works any more

    def schedule(self) -> Step:
        if any(POISON in seq.prompt_ids for seq in self.waiting):
            time.sleep(0.1)
            if self.for_good:
                self.running = Unreadable()  # type: ignore[assignment]
            raise self.error
        return super().schedule()

    def remove(self, seq: Sequence) -> None:
        if isinstance(self.running, Unreadable):
            raise self.error
        super().remove(seq)


@pytest.mark.parametrize("error", [ValueError("fatal"), SystemExit(1), Panic("fatal")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("for_good", [False, True])
def test_nobody_waits_for_an_engine_that_has_died(error: BaseException, for_good: bool) -> None:
    async def scenario(engine: Engine) -> None:
        first = asyncio.create_task(collect(engine, [make_seq([POISON])]))
        await asyncio.sleep(0.03)
        late = make_seq([1])
        found = await collect(engine, [late])  # its message was never read
        assert found[late.id][1] == "error"
        assert [end for _, end, _ in (await first).values()] == ["error"]
        assert not engine.healthy()
        with pytest.raises(Overloaded):
            engine.submit([make_seq([1])])

    engine = make_engine(FakeExecutor())
    engine.scheduler = scheduler = FatalScheduler(engine.blocks, engine.config)
    scheduler.error, scheduler.for_good = error, for_good
    serve(engine, scenario)


class ShortExecutor(FakeExecutor):
    """Forgets the results of a step of several, and cannot forget a sequence."""

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        results = super().run(step)
        return results if len(step) == 1 else results[:1]

    def forget(self, seq: Sequence) -> None:
        raise ValueError("gone")


def test_an_executor_that_breaks_its_contract_does_not_break_the_engine() -> None:
    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([i]) for i in range(3)]
        found = await collect(engine, seqs)
        assert all(found[seq.id] == (expected(seq.prompt_ids, 8), "length", None) for seq in seqs)
        assert engine.healthy()

    serve(make_engine(ShortExecutor()), scenario)


def test_after_stop_nothing_is_taken_in() -> None:
    async def scenario(engine: Engine) -> None:
        engine.stop()
        with pytest.raises(Overloaded) as refused:
            engine.submit([make_seq([1])])
        assert refused.value.status == 503

    serve(make_engine(FakeExecutor(0.05)), scenario)


def test_a_request_larger_than_the_queue_runs_when_nobody_waits() -> None:
    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([i]) for i in range(5)]
        assert all(end == "length" for _, end, _ in (await collect(engine, seqs)).values())

    serve(make_engine(FakeExecutor(), max_queue_size=4), scenario)


def test_many_drafts_in_a_small_budget_lose_nothing() -> None:
    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([i] * 3, max_tokens=20) for i in range(8)]
        found = await collect(engine, seqs)
        assert all(found[seq.id][0] == expected(seq.prompt_ids, 20) for seq in seqs)

    executor = FakeExecutor()
    serve(make_engine(executor, drafter=Oracle(), max_batch_tokens=8), scenario)
    assert all(sum(step) <= 8 for step in executor.steps)
