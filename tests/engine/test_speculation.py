"""The decisions of speculative decoding, with costs and outcomes that are known."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blade import Draft, SamplingParams, Sequence
from blade.engine.acceptance import Acceptance
from blade.engine.allocation import MARGIN, allocate, is_common
from blade.engine.costs import MOST_TOKENS, StepCosts
from blade.engine.drafting import GuardedDrafter, Price
from blade.engine.speculation import Speculator

FLAT = StepCosts({1: 1.0, 64: 1.0})  # as memory-bound as can be
STEEP = StepCosts({1: 1.0, 2: 2.0})  # every token costs its price


def make_seq(seq_id: int = 1, max_tokens: int = 1000) -> Sequence:
    return Sequence(seq_id, [1, 2, 3], SamplingParams(max_tokens=max_tokens), output_ids=[4])


# ------------------------------------------------------------------------------------------ costs


def test_costs_lie_on_the_lines_between_what_was_measured() -> None:
    costs = StepCosts({1: 1.0, 5: 2.0, 9: 4.0})
    assert [costs.seconds(num) for num in (0, 1, 3, 5, 7, 9)] == [1.0, 1.0, 1.5, 2.0, 3.0, 4.0]
    assert costs.seconds(17) == pytest.approx(4.0 + 8 * 3 / 8)
    assert costs.seconds(MOST_TOKENS + 100) == pytest.approx(costs.seconds(MOST_TOKENS) + 100 * costs.per_token)


def test_a_disturbed_measurement_is_seen_through() -> None:
    costs = StepCosts({1: 1.0, 2: 9.0, 4: 1.2, 8: 1.4})
    assert costs.seconds(2) == 1.2


def test_costs_follow_a_machine_that_slows_down() -> None:
    costs = StepCosts({1: 1.0, 8: 2.0})
    for _ in range(200):
        costs.learn(1, 1, 3.0)
    assert costs.seconds(1) == pytest.approx(3.0, rel=0.05)
    assert costs.seconds(8) > 3.0  # the whole curve rises, what was seen more than the rest
    costs = StepCosts({1: 1.0, 8: 2.0})
    costs.learn(1, 1, 1000.0)
    assert costs.seconds(1) < 1.2  # one step says little


# ------------------------------------------------------------------------------------------ acceptance


def test_acceptance_is_learnt_from_drafts_that_were_never_verified() -> None:
    acceptance, rng = Acceptance(), random.Random(0)
    seq = make_seq()
    for _ in range(400):
        ids = [rng.random() < 0.8 for _ in range(4)]  # True comes true
        acceptance.watch(seq, Draft([9 if right else 8 for right in ids], 3, "a"))
        for _ in ids:
            seq.output_ids.append(9)
            acceptance.look(seq)
    assert acceptance.of(seq.id, ("a", 3), 0.1) == pytest.approx(0.8, abs=0.2)
    assert acceptance.of(99, ("a", 3), 0.1) == pytest.approx(0.8, abs=0.1)  # others start from what all have shown
    assert acceptance.of(99, ("a", 2), 0.1) == pytest.approx(0.1)


def test_a_draft_is_judged_however_its_output_arrives() -> None:
    for chunks in ([[5, 6, 7]], [[5], [6], [7]], [[5, 6], [7]]):
        acceptance, seq = Acceptance(), make_seq()
        acceptance.watch(seq, Draft([5, 6, 0, 7], 0, "a"))
        for chunk in chunks:
            acceptance.watch(seq, Draft([0], 0, "a"))  # not while another is judged
            seq.output_ids += chunk
            acceptance.look(seq)
        assert acceptance._pools["a", 0].accepted == 2
        assert acceptance._pools["a", 0].judged == 3
        acceptance.forget(seq)
        assert not acceptance._tallies
        assert not acceptance._watched


# ------------------------------------------------------------------------------------------ allocation


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0.05, 0.95)), min_size=1, max_size=4),
    st.floats(0.0, 0.5),
    st.integers(0, 12),
)
def test_no_other_number_of_tokens_brings_more_per_second(
    drafts: list[tuple[int, float]], slope: float, most: int
) -> None:
    def goodput(lengths: list[int]) -> float:
        expected = sum(sum(p**j for j in range(length + 1)) for length, (_, p) in zip(lengths, drafts, strict=True))
        return expected / (1 + slope * sum(lengths))

    taken = allocate(drafts, lambda n, depth: 1 + slope * n, most)
    assert sum(taken) <= most
    assert all(length <= limit for length, (limit, _) in zip(taken, drafts, strict=True))

    def others(place: int, room: int) -> list[list[int]]:
        if place == len(drafts):
            return [[]]
        return [
            [num, *rest] for num in range(min(room, drafts[place][0]) + 1) for rest in others(place + 1, room - num)
        ]

    best = max(goodput(lengths) for lengths in others(0, most) if is_common(len(drafts) + sum(lengths)))
    nothing = goodput([0] * len(drafts))
    assert goodput(taken) == pytest.approx(best) or (not any(taken) and best <= nothing * MARGIN * (1 + 1e-9))


def test_the_drafters_own_time_counts_by_depth() -> None:
    drafts = [(4, 0.9)] * 4
    assert allocate(drafts, lambda n, depth: 1.0, 99) == [4] * 4
    assert allocate(drafts, lambda n, depth: 1.0 + 0.8 * depth, 99) == [1] * 4
    assert allocate(drafts, lambda n, depth: 1.0 + 2 * depth, 99) == [0] * 4


# ------------------------------------------------------------------------------------------ all together


class FixedPrice(Price):
    def learn(self, seconds: float, num_seqs: int, depth: int, num_new: int) -> None: ...


class Guess:
    """Proposes that the same id comes again and again."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
        self.asked.append(list(limits))
        return [Draft([9] * limit) for limit in limits]

    def forget(self, seq: Sequence) -> None: ...


def play(speculator: Speculator, seq: Sequence, says: list[int]) -> list[int]:
    """Lengths of the drafts while the model says these ids, in steps that take as long as is believed."""
    lengths, place = [], 0
    while place < len(says):
        speculator.draft([seq], False)
        num_drafted = len(seq.draft_ids)
        rest = says[place : place + num_drafted]
        num_accepted = next((i for i, token in enumerate(rest) if token != seq.draft_ids[i]), len(rest))
        new = says[place : place + num_accepted + 1]
        seq.draft_ids, place = [], place + len(new)
        seq.output_ids += new
        costs = speculator._costs
        speculator.stepped(1, 1 + num_drafted, costs.seconds(1 + num_drafted) if costs else 1.0)
        if num_drafted:
            speculator.verified(seq, num_drafted, min(num_accepted, len(new)))
        lengths.append(num_drafted)
    return lengths


def speculate(guess: Guess, costs: StepCosts | None, price: float = 0.0, per_new: float = 0.0) -> Speculator:
    guarded = GuardedDrafter("guess", guess, 100)
    speculator = Speculator([guarded], costs, 4, 10_000)
    if price:
        guarded.price = FixedPrice(price, price, per_new)
    return speculator


def test_drafts_that_come_true_grow_and_others_are_given_up() -> None:
    costs = StepCosts({1: 1.0, 5: 1.6})
    speculator = speculate(Guess(), costs)
    seq = make_seq()
    assert play(speculator, seq, [9] * 100)[-1] == 4
    lengths = play(speculator, seq, [8] * 40)
    assert lengths[-20:] == [0] * 20  # and yet:
    assert play(speculator, seq, [9] * 100)[-1] == 4


def test_what_never_pays_is_never_verified() -> None:
    speculator = speculate(Guess(), STEEP)
    assert not any(play(speculator, make_seq(), [9] * 50))
    speculator = speculate(Guess(), FLAT)
    assert all(play(speculator, make_seq(), [9] * 48))


def test_without_costs_all_is_verified() -> None:
    assert play(speculate(Guess(), None), make_seq(), [8] * 10) == [4] * 10


def test_a_costly_drafter_is_asked_for_what_pays_and_tried_again_later() -> None:
    costs = StepCosts({1: 1.0, 5: 1.2})
    guess = Guess()
    speculator = speculate(guess, costs, price=0.3)
    seq = make_seq()
    play(speculator, seq, [9] * 30)
    assert guess.asked[-1] == [4]
    play(speculator, seq, [8] * 30)
    asked = len(guess.asked)
    play(speculator, seq, [8] * 300)
    assert 3 <= len(guess.asked) - asked <= 7  # 1.5 % of the time, at 0.6 a time
    play(speculator, seq, [9] * 400)
    assert guess.asked[-1] != [2]


def test_a_prompt_is_read_by_a_drafter_only_if_that_can_repay() -> None:
    costs = StepCosts({1: 1.0, 5: 1.2})
    for num_prompt, max_tokens, reads in (
        (10, 1000, True),
        (10_000, 1000, False),
        (1000, 300, True),
        (1000, 20, False),
    ):
        guess = Guess()
        seq = Sequence(1, [1] * num_prompt, SamplingParams(max_tokens=max_tokens), output_ids=[4])
        speculate(guess, costs, price=0.1, per_new=0.05).draft([seq], False)
        assert bool(guess.asked) is reads


def test_room_is_left_for_the_models_own_token() -> None:
    speculator = speculate(Guess(), None)
    for max_tokens, length in ((2, 0), (3, 1), (4, 2), (99, 4)):
        seq = make_seq(max_tokens=max_tokens)
        speculator.draft([seq], False)
        assert len(seq.draft_ids) == length


def test_the_first_drafter_with_an_idea_is_taken() -> None:
    class Never(Guess):
        def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
            super().propose(seqs, limits)
            return [Draft([7] * limit) if seq.id == 1 else Draft() for seq, limit in zip(seqs, limits, strict=True)]

    first, second = Never(), Guess()
    drafters = [GuardedDrafter("first", first, 100), GuardedDrafter("second", second, 100)]
    speculator = Speculator(drafters, None, 2, 1000)
    seqs = [make_seq(1), make_seq(2)]
    speculator.draft(seqs, False)
    assert [seq.draft_ids for seq in seqs] == [[7, 7], [9, 9]]
    assert second.asked == [[2]]
    speculator.verified(seqs[0], 2, 1)
    assert [stats.tokens_accepted for stats in speculator.stats] == [1, 0]


def test_ids_beyond_the_models_vocabulary_end_a_draft() -> None:
    class Wide(Guess):
        def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
            return [Draft([5, 120, 6])]

    (draft,) = GuardedDrafter("wide", Wide(), 100).propose([make_seq()], [4])
    assert draft.ids == [5]
