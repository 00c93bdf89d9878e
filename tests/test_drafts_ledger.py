"""benchmarks/drafts_ledger.py: what drafts won and lost, by times that are known."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blade import DrafterStats, EngineStats

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import drafts_ledger  # noqa: E402

sys.path.remove(str(BENCHMARKS))

SEQ: Any = None  # nobody looks at it


class World:
    """An engine of whose steps and drafters it is said how long they take, by a clock that stands still else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.step_seconds = self.drafter_seconds = 0.0
        monkeypatch.setattr(drafts_ledger.time, "perf_counter", lambda: self.now)
        self.speculator: Any = SimpleNamespace(
            draft=self.propose, stepped=lambda *_: None, verified=lambda *_: None, stats=()
        )
        self.ledger = drafts_ledger.Ledger(self)  # type: ignore[arg-type]

    def stats(self) -> EngineStats:
        return EngineStats(step_seconds=self.step_seconds)

    def propose(self, seconds: float) -> None:
        self.now += seconds
        self._count(seconds)

    def _count(self, seconds: float) -> None:
        self.drafter_seconds += seconds
        self.speculator.stats = (DrafterStats("some", seconds=self.drafter_seconds),)

    def step(
        self, num_seqs: int, num_drafted: int, seconds: float, accepted: int = 0, drafting: float = 0.0,
        reading: float = 0.0, again: int = 0, prompts: bool = False,
    ) -> None:  # fmt: skip
        """`seconds`: without `reading`, what a drafter does within it."""
        self.speculator.draft(drafting)
        self._count(reading)
        self.step_seconds += seconds + reading
        if not prompts:
            self.speculator.stepped(num_seqs, num_seqs + num_drafted, seconds + reading)
        if num_drafted:
            self.speculator.verified(SEQ, num_drafted, accepted, again)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_without_drafts_nothing_is_won(world: World) -> None:
    assert world.ledger.speedup() == 1
    for _ in range(9):
        world.step(2, 0, 1.0)
    assert world.ledger.speedup() == 1


def test_what_was_accepted_would_have_taken_steps(world: World) -> None:
    for seconds in (0.5, 1.5, 1.0, 4.0):  # the last is a stall: it was not the step that took so long
        world.step(2, 0, seconds)
    world.step(2, 4, 1.5, accepted=4)  # two steps of two sequences
    assert world.ledger.speedup() == pytest.approx((7 + 3) / 8.5)
    world.step(2, 4, 1.5, accepted=3, again=3)
    assert world.ledger.speedup() == pytest.approx((7 + 3 + 1) / 10)


def test_steps_are_compared_with_those_of_as_many_sequences(world: World) -> None:
    world.step(3, 3, 4.0, accepted=3)  # there are none without drafts to compare it with
    assert world.ledger.speedup() == 1
    world.ledger.start_anew()
    for _ in range(8):
        world.step(4, 0, 2.0)
    world.step(4, 2, 3.0, accepted=2)
    assert world.ledger.speedup() == pytest.approx((16 + 3) / 19)


def test_where_few_steps_were_without_drafts_others_tell(world: World) -> None:
    for _ in range(8):
        world.step(1, 0, 1.0)
        world.step(7, 0, 4.0)
    world.step(3, 0, 2.1)  # a single one, of what is 2 on the line between the others
    world.step(3, 3, 2.5, accepted=6)
    assert world.ledger.speedup() == pytest.approx((40 + 2.1 + 2 + 4) / (40 + 2.1 + 2.5), rel=0.02)


def test_drafting_is_lost_wherever_it_happens(world: World) -> None:
    world.step(1, 0, 1.0, drafting=0.25)
    assert world.ledger.speedup() == pytest.approx(1 / 1.25)
    world.step(1, 0, 1.0, reading=0.5)
    assert world.ledger.speedup() == pytest.approx(2 / 2.75)
    world.step(1, 1, 1.0, accepted=1, reading=0.25)
    assert world.ledger.speedup() == pytest.approx(4 / 4)


def test_steps_with_prompts_win_nothing_and_lose_what_drafters_do(world: World) -> None:
    world.step(1, 0, 1.0)
    world.step(1, 1, 7.0, accepted=1, reading=1.0, prompts=True)
    assert world.ledger.speedup() == pytest.approx(8 / 9)
    world.ledger.start_anew()
    assert world.ledger.speedup() == 1
