"""What speculation may spend: on asking in vain, on wrong drafts, on shapes of steps that are new."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blade import Draft, SamplingParams, Sequence
from blade.engine.allocation import allocate, least_chance
from blade.engine.budget import FIRST, GIVEN, MOST_SHAPES, OWED, SAVED, SHARE, Budget, Shapes
from blade.engine.coming_step import ComingStep
from blade.engine.costs import StepCosts
from blade.engine.drafting import GuardedDrafter, Price
from blade.engine.rest import MOST, Rest
from blade.engine.rest import SHARE as SHARE_OF_THINKING
from blade.engine.speculation import Speculator
from blade.engine.turns import SAVED as SAVED_TURNS
from blade.engine.turns import SHARE as SHARE_OF_ASKING
from blade.engine.turns import STAYS, Turns

PARAMS = SamplingParams(max_tokens=1000)


def make_seqs(num: int) -> list[Sequence]:
    return [Sequence(i, [1, 2, 3], PARAMS, output_ids=[4]) for i in range(num)]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0.0, 1.0)), min_size=1, max_size=8),
    st.floats(0.0, 1.5),
    st.floats(0.0, 1.0),
)
def test_what_is_no_likelier_than_the_least_chance_is_never_taken(
    drafts: list[tuple[int, float]], slope: float, curvature: float
) -> None:
    def seconds(num: int, depth: int) -> float:
        return 1 + slope * num**curvature

    least = least_chance(len(drafts), seconds, 4 * len(drafts))
    unlikely = [(length, min(chance, least - 1e-9)) for length, chance in drafts if min(chance, least) > 0]
    if len(unlikely) == len(drafts):
        assert not any(allocate(unlikely, seconds, 4 * len(drafts)))


# ------------------------------------------------------------------------------------------ turns


def test_asking_in_vain_takes_its_share_of_the_time_and_everybody_has_a_turn() -> None:
    turns, seqs, asks = Turns(), make_seqs(16), [0] * 16
    for _ in range(1000):
        for i in turns.choose(seqs, 1.0, 1.0, lambda seq: 0.01):
            asks[i] += 1
    assert sum(asks) * 0.01 == pytest.approx(1000 * SHARE_OF_ASKING, rel=0.05)
    assert max(asks) - min(asks) <= 1
    assert turns.choose(seqs, 1.0, 1.0, lambda seq: 0.0) == set(range(16))  # what takes no time is always done


def test_those_whose_drafts_are_verified_are_always_asked_for() -> None:
    turns, seqs = Turns(), make_seqs(4)
    turns.paid(seqs[2])
    chosen = [turns.choose(seqs, 1.0, 1.0, lambda seq: 1.0) for _ in range(STAYS + 1)]
    assert chosen == [{2}] * STAYS + [set()]
    turns.paid(seqs[2])
    turns.forget(seqs[2])
    assert turns.choose(seqs, 1.0, 1.0, lambda seq: 1.0) == set()


def test_what_takes_long_is_saved_up_for_and_what_takes_for_ever_is_passed_over() -> None:
    seqs, step = make_seqs(2), 1.0
    turns, price = Turns(), 10 * SHARE_OF_ASKING
    assert [0 in turns.choose(seqs[:1], step, step, lambda seq: price) for _ in range(12)].index(True) in (9, 10)
    turns, dear = Turns(), 2 * SAVED_TURNS * SHARE_OF_ASKING
    for _ in range(5):
        assert turns.choose(seqs, step, step, lambda seq: dear if seq.id == 0 else 0.0) == {1}


# ------------------------------------------------------------------------------------------ rest


def test_thoughts_that_nothing_comes_of_take_a_share_of_the_time() -> None:
    rest, num_thoughts, thought = Rest(), 0, 4 * SHARE_OF_THINKING
    seconds = 0.0
    for _ in range(1000):
        if not rest.goes_on(1.0):
            seconds += rest.end()
            num_thoughts += 1
            rest.begin(thought)
    assert num_thoughts == pytest.approx(250, abs=2)
    assert seconds == pytest.approx(1000, abs=4)  # no step's time is lost to those that live of a share of it


def test_a_rest_is_never_long() -> None:
    rest = Rest()
    rest.begin(1000.0)
    assert [rest.goes_on(1.0) for _ in range(MOST + 1)].index(False) <= MOST


# ------------------------------------------------------------------------------------------ budget


def test_no_more_is_lost_than_was_won_and_a_share_of_the_time() -> None:
    budget = Budget()
    budget.open(1.0, 1.0, 0.0)
    assert budget.seconds == pytest.approx(GIVEN + SHARE)
    budget.spend(5.0)
    assert budget.seconds == -OWED
    budget.open(1.0, 3.0, 0.0)
    assert budget.seconds == pytest.approx(3 * SHARE - OWED)
    budget.win(100.0)
    budget.open(1.0, 1.0, 0.5)
    assert budget.seconds == SAVED + FIRST * 0.5  # what was won long ago is not to be lost now


def test_wrong_drafts_cost_a_bounded_share_of_the_time_whatever_is_believed() -> None:
    """Drafts are wrong just when they are verified, so that their chance never seems to fall."""

    class Guess:
        def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
            return [Draft([9] * limit) for limit in limits]

        def forget(self, seq: Sequence) -> None: ...

    costs = StepCosts({1: 1.0, 5: 2.0})
    speculator = Speculator([GuardedDrafter("guess", Guess(), 100)], costs, 4, 10_000)
    (seq,) = make_seqs(1)
    lost, num_steps = 0.0, 400
    for _ in range(num_steps):
        speculator.draft([seq], False)
        num_drafted, seq.draft_ids = len(seq.draft_ids), []
        lost += num_drafted * 0.25
        seq.output_ids.append(8 if num_drafted else 9)
        speculator.stepped(1, 1 + num_drafted, 1.0 + num_drafted * 0.25)
        if num_drafted:
            speculator.verified(seq, num_drafted, 0)
    assert 0 < lost <= GIVEN + num_steps * SHARE + 0.5


def test_a_new_shape_is_tried_only_where_its_price_can_be_lost() -> None:
    costs, shapes, budget = StepCosts({1: 1.0, 64: 1.0}), Shapes([(2, 4)]), Budget()
    shapes.learn(3.0)
    budget.open(1.0, 1.0, 3.0)
    offers = [(4, 0.9), (4, 0.9)]
    assert ComingStep(costs, shapes, budget, 2, False).allocate(offers) == [1, 1]  # four tokens: that is known
    assert ComingStep(costs, shapes, budget, 2, True).allocate(offers) == [4, 4]  # beside a prompt all are new
    budget.win(3.0)
    assert ComingStep(costs, shapes, budget, 2, False).allocate(offers) == [4, 4]


def test_shapes_that_were_not_used_for_long_are_new_again() -> None:
    shapes = Shapes()
    for num in range(MOST_SHAPES):
        assert shapes.is_new(1, num)
        for _ in range(FIRST):
            shapes.add(1, num)
    assert not shapes.is_new(1, 0)
    shapes.add(1, 0)
    shapes.add(2, 2)
    assert not shapes.is_new(1, 0)
    assert shapes.is_new(1, 1)


def test_steps_without_drafts_do_not_bend_the_curve() -> None:
    costs = StepCosts({1: 1.0, 16: 2.0, 24: 3.0})
    for _ in range(200):
        costs.learn(16, 16, 4.0)
    assert costs.seconds(24) / costs.seconds(16) == pytest.approx(1.5)
    for _ in range(400):
        costs.learn(16, 16, 4.0)
        costs.learn(16, 24, 8.0)
    assert costs.seconds(24) / costs.seconds(16) == pytest.approx(2.0, rel=0.05)


def test_a_cheap_drafter_reads_a_prompt_where_that_is_nothing_beside_the_rest() -> None:
    class FixedPrice(Price):
        def learn(self, seconds: float, num_seqs: int, depth: int, num_new: int) -> None: ...

    class Silent:
        def __init__(self) -> None:
            self.num_calls = 0

        def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
            self.num_calls += 1
            return [Draft()] * len(seqs)

        def forget(self, seq: Sequence) -> None: ...

    for per_new, reads in ((1e-5, True), (1e-2, False)):
        drafter = Silent()
        guarded = GuardedDrafter("silent", drafter, 100)
        guarded.price = FixedPrice(0.001, 0.001, per_new)
        speculator = Speculator([guarded], StepCosts({1: 1.0, 5: 1.2}), 4, 100_000)
        speculator.draft([Sequence(1, [1] * 5000, PARAMS, output_ids=[4])], False)
        assert bool(drafter.num_calls) is reads
