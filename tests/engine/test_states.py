"""States of recurrent layers: their books, and that every token is the model's own whatever happens on the way."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent import BLOCK_SIZE, RecurrentModel, collect, make_engine, make_seq, serve

from blade import Sequence
from blade.engine.blocks import MIN_GAIN, BlockPool
from blade.engine.engine import Engine
from blade.engine.states import NO_SLOT, StatePool

LONG = 2 * MIN_GAIN  # tokens of a prefix that is worth keeping


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(rng.choice([1, 3, 40, 90, 150]))] for _ in range(num)]


async def check(engine: Engine, given: list[list[int]], max_tokens: int = 12) -> list[Sequence]:
    seqs = [make_seq(prompt, max_tokens) for prompt in given]
    said = await collect(engine, seqs)
    for seq in seqs:
        assert said[seq.id] == RecurrentModel().generate(seq.prompt_ids, max_tokens)
    return seqs


# ------------------------------------------------------------------------------------------ through the engine

WAYS: dict[str, dict[str, Any]] = {
    "plenty": {"num_slots": 60},
    "small steps": {"max_batch_tokens": 9},
    "few slots": {"num_slots": 6, "max_num_seqs": 3},
    "preemption": {"num_blocks": 60},
    "no prefix cache": {"prefix_cache": False},
    "drafts": {"drafts": True},
    "drafts in small steps": {"drafts": True, "max_batch_tokens": 9, "num_blocks": 60},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_models_own(way: str) -> None:
    async def scenario(engine: Engine) -> None:
        await check(engine, prompts(14))
        again = await check(engine, prompts(14))  # with what was kept of them
        assert sum(seq.num_cached for seq in again) > 0 or way != "plenty"

    serve(make_engine(RecurrentModel(), **WAYS[way]), scenario)


def test_a_step_that_fails_is_run_again_from_the_same_states() -> None:
    rng = random.Random(1)

    async def scenario(engine: Engine) -> None:
        await check(engine, prompts(10, seed=1))

    serve(make_engine(RecurrentModel(), fails=lambda: rng.random() < 0.4), scenario)


def test_a_chat_goes_on_from_where_it_ended() -> None:
    async def scenario(engine: Engine) -> None:
        ids = prompts(1, seed=2)[0] + [1] * LONG
        (first,) = await check(engine, [ids], max_tokens=30)
        ids += [*first.output_ids, 5, 6, 7]
        (second,) = await check(engine, [ids], max_tokens=30)
        assert second.num_cached == (len(ids) - 3 - 1) // BLOCK_SIZE * BLOCK_SIZE  # the last id had no state yet

    serve(make_engine(RecurrentModel()), scenario)


def test_the_end_of_a_prompt_is_kept_for_the_same_prompt() -> None:
    async def scenario(engine: Engine) -> None:
        ids = list(range(90))
        await check(engine, [ids])
        (again,) = await check(engine, [ids])
        assert again.num_cached == 88

    serve(make_engine(RecurrentModel()), scenario)


def test_copies_that_arrive_together_compute_their_prompt_once() -> None:
    async def scenario(engine: Engine) -> None:
        model = engine.executor.model  # type: ignore[attr-defined]
        await check(engine, [list(range(90))] * 6, max_tokens=4)
        assert model.num_tokens == 88 + 6 * (2 + 3)

    serve(make_engine(RecurrentModel()), scenario)


def test_where_prompts_part_is_learnt_from_the_second_of_them() -> None:
    async def scenario(engine: Engine) -> None:
        common = [i % 90 for i in range(LONG)]
        cached = []
        for own in range(3):
            (seq,) = await check(engine, [common + [own] * 20])
            cached.append(seq.num_cached)
        assert cached == [0, 0, LONG]

    serve(make_engine(RecurrentModel()), scenario)


def test_prompts_that_begin_alike_and_arrive_together_wait_for_the_common_part() -> None:
    async def scenario(engine: Engine) -> None:
        common = [i % 90 for i in range(LONG)]
        seqs = await check(engine, [common + [own] * 20 for own in range(4)])
        first, *others = sorted(seq.num_cached for seq in seqs)
        assert (first, min(others) > LONG - MIN_GAIN) == (0, True)

    serve(make_engine(RecurrentModel()), scenario)


def test_who_leaves_leaves_nothing_behind() -> None:
    async def scenario(engine: Engine) -> None:
        seqs = [make_seq([9, *range(60)], 400) for _ in range(3)]
        streams = [engine.submit([seq]) for seq in seqs]
        async for _ in streams[0]:
            if len(seqs[0].output_ids) > 5:
                break
        for stream in streams:
            stream.abort()
        await check(engine, prompts(5, seed=3))

    serve(make_engine(RecurrentModel()), scenario)


# ------------------------------------------------------------------------------------------ the books alone


def pool_of(num_slots: int, num_blocks: int = 100) -> BlockPool:
    return BlockPool(num_blocks, BLOCK_SIZE, states=StatePool(num_slots))


def run(pool: BlockPool, seq: Sequence, num_tokens: int) -> None:
    assert pool.grow(seq, num_tokens)
    pool.advance(seq, num_tokens, seq.computed + num_tokens)


def test_no_sequence_starts_whose_step_could_not_be_run_twice() -> None:
    pool = pool_of(5)
    seqs = [make_seq([i] * 9) for i in range(3)]
    assert [pool.attach_prefix(seq) and pool.grow(seq, 9) for seq in seqs] == [True, True, False]
    pool.release(seqs[2])
    for seq in seqs[:2]:
        pool.advance(seq, 9, 9)
        run(pool, seq, 0)  # both have what they need for their next step
    pool.check(seqs[:2])
    pool.release(seqs[0])
    assert pool.attach_prefix(seqs[2])
    assert pool.grow(seqs[2], 9)
    pool.check(seqs[1:])


def test_a_rejected_draft_goes_back_to_the_state_before_it() -> None:
    pool = pool_of(4)
    seq = make_seq([1, 2, 3])
    assert pool.attach_prefix(seq)
    run(pool, seq, 3)
    before, spare = seq.state, seq.next_state
    assert pool.grow(seq, 3)  # a token and two of a draft, of which the second is rejected
    pool.advance(seq, 3, 5)
    assert (seq.computed, seq.state) == (3, before)
    assert spare == NO_SLOT
    assert pool.grow(seq, 2)
    pool.advance(seq, 2, 5)
    assert (seq.computed, seq.state != before) == (5, True)
    pool.check([seq])


def test_a_state_goes_with_the_block_that_it_is_found_by() -> None:
    pool = pool_of(8, num_blocks=24)
    first = make_seq(list(range(92)))
    assert pool.attach_prefix(first)
    run(pool, first, pool.chunk(first, 92))
    assert first.computed == 88  # a prompt is never taken whole: the last of its blocks is not looked for
    pool.release(first)
    assert pool.states is not None
    assert pool.states.num_kept == 1
    other = make_seq([7] * 96)
    assert pool.attach_prefix(other)
    assert pool.grow(other, 96)
    assert pool.states.num_kept == 0
    pool.check([other])


def test_check_notices_a_lost_slot() -> None:
    pool = StatePool(3)
    pool._free.pop()
    with pytest.raises(RuntimeError, match="total"):
        pool.check()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(4, 12),
    st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 1), min_size=1, max_size=4), st.integers(1, 60)),
        max_size=60,
    ),
)
def test_books_balance_whatever_happens(num_slots: int, events: list[tuple[int, list[int], int]]) -> None:
    """Random arrivals (much is shared), random progress, some of it taken back, random departures."""
    pool, live = pool_of(num_slots, num_blocks=90), dict[int, Sequence]()
    for who, letters, num_tokens in events:
        seq = live.get(who)
        if seq is None:
            seq = make_seq([letter for letter in letters for _ in range(40)])
            if pool.attach_prefix(seq):
                live[who] = seq
        elif seq.num_owed and pool.grow(seq, min(num_tokens, seq.num_owed)):
            num = pool.chunk(seq, min(num_tokens, seq.num_owed))
            pool.advance(seq, num, seq.computed + (num if num_tokens % 7 else num // 2))
        else:
            pool.release(live.pop(who))
        pool.check(live.values())
    for seq in live.values():
        pool.release(seq)
    pool.check()
    assert pool.states is not None
    assert pool.states.num_kept == sum(1 for block_hash in pool.states._hashes if block_hash)
