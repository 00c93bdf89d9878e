"""What drafters are shown of hidden states, and what that may cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blade import Draft, SamplingParams, Sequence
from blade.engine.costs import StepCosts
from blade.engine.drafting import GuardedDrafter
from blade.engine.reading import GIVEN, SAVED, Reading
from blade.engine.speculation import Speculator

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    import pytest

STEP = 0.125  # seconds


def seq(seq_id: int) -> Sequence:
    return Sequence(seq_id, [1, 2, 3], SamplingParams(max_tokens=64), output_ids=[4])


def test_without_a_limit_all_are_shown() -> None:
    reading = Reading()
    reading.spend(1e9)
    assert reading.chosen([seq(1), seq(2)]) == [0, 1]


def test_those_that_begin_while_nothing_is_left_are_left_out_until_they_are_asked_for() -> None:
    reading = Reading()
    reading.limit(STEP)
    assert reading.chosen([seq(1)]) == [0]
    reading.spend((GIVEN + 1) * STEP)
    assert reading.chosen([seq(2), seq(1), seq(3)]) == [1]
    reading.ask([seq(3)])
    reading.gain(STEP, won=2 * STEP)
    assert reading.chosen([seq(2), seq(1), seq(3), seq(4)]) == [1, 2, 3]  # those that have begun stay left out
    reading.forget(seq(2))
    assert reading.chosen([seq(2)]) == [0]


def test_time_and_wins_bring_more_up_to_a_bound() -> None:
    reading = Reading()
    reading.limit(STEP)
    reading.spend(GIVEN * STEP)
    reading.gain(STEP, passed=100 * STEP)  # half a percent of it
    reading.spend(0.25 * STEP)
    assert reading.chosen([seq(1)]) == [0]
    reading.spend(0.5 * STEP)
    assert reading.chosen([seq(2)]) == []
    reading.gain(STEP, won=1e9)
    reading.spend((SAVED - 1) * STEP)
    assert reading.chosen([seq(3)]) == [0]
    reading.spend(2 * STEP)
    assert reading.chosen([seq(4)]) == []


class Slow:
    """A drafter that takes its time to read, by a clock of its own, and guesses `right` or not at all."""

    hidden_states = (1,)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.shown, self.drafts = 0.0, list[int](), True
        monkeypatch.setattr("blade.engine.drafting.time.perf_counter", lambda: self.now)

    def observe(self, seqs: Seq[Sequence], spans: Seq[range], rows: Seq[int], hidden: Any) -> None:
        assert len(seqs) == len(spans) == len(rows)
        assert [int(hidden[row]) for row in rows] == [seq.id for seq in seqs]
        self.shown = [seq.id for seq in seqs]
        self.now += STEP * len(seqs)

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        return [Draft([7] * limit if self.drafts else []) for limit in limits]

    def forget(self, seq: Sequence) -> None: ...


def show(drafter: GuardedDrafter, seqs: list[Sequence]) -> None:
    hidden = torch.tensor([seq.id for seq in seqs for _ in range(2)])
    drafter.observe(seqs, [range(2)] * len(seqs), range(0, 2 * len(seqs), 2), hidden)


def test_reading_that_nothing_comes_of_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    drafter = GuardedDrafter("slow", slow, 100)
    speculator = Speculator([drafter], StepCosts({1: STEP, 2: 2 * STEP}), 4, 4096)
    first = [seq(i) for i in range(GIVEN + 2)]
    show(drafter, first)
    assert slow.shown == [seq.id for seq in first]
    show(drafter, [first[1], seq(50), first[0]])
    assert slow.shown == [1, 0]
    for _ in range(9 * 200):  # steps that bring half a percent of their time
        speculator.stepped(1, 1, STEP)
    show(drafter, [seq(60), seq(50)])
    assert slow.shown == [60]


def test_what_drafts_win_may_be_spent_on_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    drafter = GuardedDrafter("slow", slow, 100)
    speculator = Speculator([drafter], StepCosts({1: STEP, 2: STEP}), 4, 4096)
    show(drafter, [seq(i) for i in range(GIVEN + 2)])
    one = seq(70)
    show(drafter, [one])
    speculator.draft([one], False)
    assert len(one.draft_ids) > 0
    speculator.verified(one, 4, 4)
    show(drafter, [one, seq(71)])
    assert slow.shown == [70, 71]


def test_a_drafter_without_states_tells_nothing_of_its_price(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    drafter = GuardedDrafter("slow", slow, 100)
    drafter.price.per_seq = drafter.price.per_depth = STEP
    slow.drafts = False
    for _ in range(50):
        drafter.propose([seq(1)], [4])
    assert drafter.price.per_seq == drafter.price.per_depth == STEP
