"""How much of prompts a step may take."""

from __future__ import annotations

from blade.engine.pace import LEAST, Pace


def test_as_much_as_there_is_time_for_within_bounds() -> None:
    pace = Pace(seconds=0.5, most=2048)
    assert pace.num_tokens == LEAST  # nothing is known yet
    pace.learn(1000, 1000, seconds=1.0)
    assert pace.num_tokens == 500
    for _ in range(20):
        pace.learn(2000, 2016, seconds=0.05)
    assert pace.num_tokens == 2048
    for _ in range(40):
        pace.learn(256, 256, seconds=2.0)
    assert pace.num_tokens == LEAST


def test_steps_with_little_of_prompts_tell_nothing() -> None:
    pace = Pace(seconds=0.5, most=2048)
    pace.learn(1000, 1000, seconds=1.0)
    pace.learn(3, 19, seconds=1.0)
    assert pace.num_tokens == 500


def test_without_a_time_only_the_budget_counts() -> None:
    pace = Pace(seconds=0, most=2048)
    pace.learn(1000, 1000, seconds=10.0)
    assert pace.num_tokens == 2048


def test_a_budget_below_the_least_chunk_stays_a_bound() -> None:
    assert Pace(seconds=0.5, most=16).num_tokens == 16
