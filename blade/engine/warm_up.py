"""A few steps nobody asked for, before the first request: they tell what steps of so many tokens cost."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from blade.engine.budget import FIRST
from blade.engine.drafting import MANY, Price
from blade.types import SamplingParams, Sequence, Step

if TYPE_CHECKING:
    from blade.contracts import Blocks, Executor
    from blade.engine.drafting import GuardedDrafter
    from blade.engine.hidden import HiddenStates
    from blade.types import Limits

NUM_TOKENS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 20, 24)  # of the steps to time
CONTEXT = 32  # tokens before those that are timed
ROUNDS = 4  # through all of them; the first ones compile or capture, the quickest counts
MOST_SECONDS = 2.0  # a large model has to do with fewer rounds
WARM_UP_ID = -1  # of the sequence; no request has it


class Measured(NamedTuple):
    """Of steps of one sequence with drafts."""

    seconds: dict[int, float]  # by tokens
    new_shape: float | None = None  # seconds more that each of the first FIRST steps of so many tokens took


def measure_costs(executor: Executor, blocks: Blocks, limits: Limits, max_batch_tokens: int) -> Measured:
    """Raises what the executor raises."""
    most = min(max_batch_tokens, limits.max_context - CONTEXT - 2, max(NUM_TOKENS))
    seq = _sequence(CONTEXT, most, limits.vocab_size)
    if most < 2 or not blocks.grow(seq, CONTEXT + most):
        return Measured({1: 1.0, 2: 2.0})  # no room for a draft either
    seconds: dict[int, list[float]] = defaultdict(list)
    started = time.monotonic()
    try:
        for seq.computed in range(0, CONTEXT, max_batch_tokens):
            _run(executor, seq, min(max_batch_tokens, CONTEXT - seq.computed))
        for _ in range(ROUNDS):  # round by round, so that a short disturbance does not bend the curve
            for num_tokens in (num for num in NUM_TOKENS if num <= most):
                seq.computed, seq.draft_ids = CONTEXT, _ids(num_tokens - 1, limits.vocab_size)
                seconds[num_tokens].append(_run(executor, seq, num_tokens))
            if (time.monotonic() - started) > MOST_SECONDS:
                break
    finally:
        blocks.release(seq)
        executor.forget(seq)
    best = {num: min(all_) for num, all_ in seconds.items()}
    longer = [sum(all_[:FIRST]) / FIRST - best[num] for num, all_ in seconds.items() if len(all_) > FIRST]
    return Measured(best, statistics.median(longer) if longer else None)


def rehearse(drafter: GuardedDrafter, max_tokens: int, vocab_size: int, hidden: HiddenStates | None = None) -> None:
    """Have the drafter compile what it compiles, and then learn what it costs. `hidden`: where any drafter reads such
    states."""
    for turn in range(2):
        drafter.price = Price()
        seq = _sequence(MANY, max_tokens + 1, vocab_size, first=turn)
        drafter.forget(seq)  # of the steps that were measured, whose sequence has the same id
        num_seen = 0
        for _ in range(ROUNDS):
            if hidden is not None:
                hidden.pretend(drafter, seq, range(num_seen, seq.num_tokens - 1))
                num_seen = seq.num_tokens - 1
            drafter.propose([seq], [max_tokens])
            seq.output_ids += _ids(1, vocab_size)
        drafter.forget(seq)
    drafter.start_anew()


def _sequence(num_prompt: int, max_tokens: int, vocab_size: int, first: int = 0) -> Sequence:
    """With one output token, so that it owes its next one."""
    params = SamplingParams(max_tokens=max_tokens + 1, temperature=0)
    prompt_ids = _ids(num_prompt, vocab_size, first)
    return Sequence(WARM_UP_ID, prompt_ids, params, namespace=b"warm-up", output_ids=_ids(1, vocab_size))


def _ids(num: int, vocab_size: int, first: int = 0) -> list[int]:
    return [(first + i * 37) % vocab_size for i in range(num)]


def _run(executor: Executor, seq: Sequence, num_tokens: int) -> float:
    """Seconds of a step of the sequence alone."""
    started = time.perf_counter()
    (result,) = executor.run(Step([seq], [num_tokens]))
    if isinstance(result, Exception):
        raise result
    return time.perf_counter() - started
