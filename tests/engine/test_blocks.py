"""The pool's books: who holds what, what is found again, what is thrown out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blade import SamplingParams, Sequence
from blade.engine.blocks import BlockPool

counter = itertools.count()


def make_seq(prompt: list[int], namespace: bytes = b"") -> Sequence:
    return Sequence(next(counter), prompt, SamplingParams(max_tokens=8), namespace=namespace)


def compute_all(pool: BlockPool, seq: Sequence) -> None:
    assert pool.attach_prefix(seq)
    compute_all_of(pool, seq)


def compute_all_of(pool: BlockPool, seq: Sequence) -> None:
    """Of one that has its prefix."""
    assert pool.grow(seq, seq.num_owed)
    seq.computed = seq.num_tokens
    pool.commit(seq)


def test_prefix_is_found_again_but_never_the_last_token() -> None:
    pool = BlockPool(8, 4)
    first = make_seq(list(range(8)))
    compute_all(pool, first)
    second = make_seq(list(range(8)))
    assert pool.attach_prefix(second)
    assert second.computed == 4  # the second block would leave nothing to compute logits from
    assert second.blocks == first.blocks[:1]
    pool.check([first, second])


def test_cached_blocks_outlive_their_sequence_until_evicted_deepest_first() -> None:
    pool = BlockPool(4, 4)
    first = make_seq(list(range(16)))
    compute_all(pool, first)
    pool.release(first)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (4, 4, 0)
    other = make_seq([99] * 5)  # takes two blocks: the two deepest of the first
    compute_all(pool, other)
    again = make_seq(list(range(16)))
    assert pool.attach_prefix(again)
    assert again.computed == 8
    pool.check([other, again])


def test_namespaces_share_nothing() -> None:
    pool = BlockPool(8, 4)
    compute_all(pool, make_seq(list(range(8)), b"tenant a"))
    stranger = make_seq(list(range(8)), b"tenant b")
    assert pool.attach_prefix(stranger)
    assert stranger.computed == 0


def test_a_prefix_under_computation_is_waited_for() -> None:
    pool = BlockPool(16, 4)
    first, second = make_seq(list(range(12))), make_seq([*range(8), 70, 71])
    assert pool.attach_prefix(first)
    assert pool.grow(first, 4)
    assert not pool.attach_prefix(second)
    first.computed = 4
    pool.commit(first)
    assert not pool.attach_prefix(second)  # the next shared block is still to come
    pool.grow(first, 8)
    first.computed = 12
    pool.commit(first)
    assert pool.attach_prefix(second)
    assert second.computed == 8
    pool.check([first, second])


def test_an_owner_that_leaves_frees_those_who_wait_for_its_prefix() -> None:
    pool = BlockPool(16, 4)
    first, second = make_seq(list(range(12))), make_seq(list(range(12)))
    assert pool.attach_prefix(first)
    assert not pool.attach_prefix(second)
    pool.release(first)
    assert pool.attach_prefix(second)


class Counting(Sequence):
    """Counts how often its tokens are looked at."""

    num_looks = 0

    def tokens(self, start: int, stop: int) -> list[int]:
        self.num_looks += 1
        return super().tokens(start, stop)


def test_who_waits_for_a_prefix_looks_at_it_when_it_is_there_and_not_in_each_step() -> None:
    pool = BlockPool(64, 4)
    first = make_seq(list(range(80)))
    second = Counting(next(counter), [*range(60), 99, 98], SamplingParams(max_tokens=8))
    compute_all(pool, made := make_seq(list(range(41))))
    pool.release(made)
    assert pool.attach_prefix(first)
    assert not pool.attach_prefix(second)
    num_looks = second.num_looks
    assert pool.grow(first, first.num_owed)
    for num_computed in range(first.computed, 60, 4):
        first.computed = num_computed
        pool.commit(first)
        assert not pool.attach_prefix(second)
    assert second.num_looks == num_looks
    first.computed = 60
    pool.commit(first)
    assert pool.attach_prefix(second)
    assert second.computed == 60
    pool.check([first, second])


def test_who_waits_turns_to_the_next_one_that_computes_the_prefix() -> None:
    pool = BlockPool(32, 4)
    first, second, third = (make_seq(list(range(12))) for _ in range(3))
    assert pool.attach_prefix(first)
    assert not pool.attach_prefix(third)
    pool.release(first)
    assert pool.attach_prefix(second)
    assert not pool.attach_prefix(third)
    compute_all_of(pool, second)
    assert pool.attach_prefix(third)
    assert third.computed == 8


def test_choices_of_one_prompt_share_its_hashes() -> None:
    pool, prompt = BlockPool(32, 4), list(range(30))
    first = make_seq(prompt)
    choices = [Counting(next(counter), prompt, SamplingParams(max_tokens=8)) for _ in range(3)]
    stranger = Counting(next(counter), prompt, SamplingParams(max_tokens=8), namespace=b"another")
    pool.attach_prefix(first)
    for choice in choices:
        assert not pool.attach_prefix(choice)
    assert [choice.num_looks for choice in choices] == [0, 0, 0]
    assert choices[2].block_hashes == first.block_hashes
    assert pool.attach_prefix(stranger)
    assert not set(stranger.block_hashes) & set(first.block_hashes)
    compute_all_of(pool, first)
    first.output_ids = [1, 2, 3]
    compute_all_of(pool, first)
    assert len(first.block_hashes) == 8
    assert pool.attach_prefix(choices[0])
    choices[0].output_ids = [4, 5, 6]
    compute_all_of(pool, choices[0])
    assert choices[0].block_hashes[:7] == first.block_hashes[:7]
    assert choices[0].block_hashes[7] != first.block_hashes[7]


def test_a_hash_collision_is_a_miss() -> None:
    pool = BlockPool(8, 4)
    first = make_seq(list(range(8)))
    compute_all(pool, first)
    pool._blocks[first.blocks[0]].ids = [7, 7, 7, 7]
    second = make_seq(list(range(8)))
    assert pool.attach_prefix(second)
    assert second.computed == 0


def test_grow_is_all_or_nothing() -> None:
    pool = BlockPool(2, 4, prefix_cache=False)
    seq = make_seq(list(range(20)))
    assert not pool.grow(seq, 9)
    assert seq.blocks == []
    assert pool.grow(seq, 8)
    pool.check([seq])


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(4, 4)
    pool._free.pop()
    with pytest.raises(RuntimeError, match="total"):
        pool.check()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 20)),
        max_size=40,
    )
)
def test_books_balance_whatever_happens(events: list[tuple[int, list[int], int]]) -> None:
    """Random arrivals over a two-letter alphabet (much is shared), random progress, random departures."""
    pool, live = BlockPool(12, 4), {}
    for who, prompt, num_tokens in events:
        seq = live.get(who)
        if seq is None:
            seq = make_seq(prompt)
            if pool.attach_prefix(seq):
                live[who] = seq
        elif seq.num_owed and pool.grow(seq, min(num_tokens, seq.num_owed)):
            seq.computed += min(num_tokens, seq.num_owed)
            pool.commit(seq)
        else:
            pool.release(live.pop(who))
        pool.check(live.values())
    for seq in live.values():
        pool.release(seq)
    pool.check()
    assert pool.num_used == 0
