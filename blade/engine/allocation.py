"""How many drafted tokens are worth verifying: those that bring most tokens per second.

The goodput of a step (as in Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models Using
Goodput") is the tokens it is expected to yield by the seconds it takes. Drafted tokens are taken in the order of their
chances, over all sequences of the step, for as long as that pays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

MARGIN = 1.02  # an expected gain below this is left alone: estimates are not that good


def is_common(num_tokens: int) -> bool:
    """Whether steps are made to have just so many tokens. A step of a shape that came before is replayed rather than
    launched call by call (contracts.Ops.capture); so the fewer shapes, the better."""
    grain = 1 if num_tokens <= 12 else 4 if num_tokens <= 32 else 8 if num_tokens <= 64 else 16
    return num_tokens % grain == 0


def allocate(drafts: Seq[tuple[int, float]], seconds: Callable[[int, int], float], most: int) -> list[int]:
    """How many tokens to take of each sequence's draft.

    `drafts`: (tokens there are, chance of each further one) of all sequences of the step, (0, 0) where there is none;
    `seconds(n, depth)`: of a step with n drafted tokens, at most `depth` of one sequence; `most`: largest n.
    """
    offers = [(chance**depth, -i, depth) for i, (length, chance) in enumerate(drafts) for depth in range(1, length + 1)]
    offers.sort(reverse=True)
    expected, deepest = float(len(drafts)), 0
    best, num_taken = expected / seconds(0, 0) * MARGIN, 0
    for num, (chance, _, depth) in enumerate(offers[:most], start=1):
        expected += chance
        deepest = max(deepest, depth)
        if is_common(len(drafts) + num) and (goodput := expected / seconds(num, deepest)) > best:
            best, num_taken = goodput, num
    taken = [0] * len(drafts)
    for _, place, _ in offers[:num_taken]:
        taken[-place] += 1
    return taken


def allocate_trees(
    trees: Seq[tuple[int, float]], num_taken: int, expected: float, seconds: Callable[[int], float], most: int
) -> list[bool]:
    """Which of `trees`, (tokens, how many of them are expected to be right), to take: each whole or not at all.

    `num_taken`: drafted tokens that are taken already; `expected`: tokens that the step yields with these alone.
    """
    taken = [False] * len(trees)
    for place in sorted(range(len(trees)), key=lambda i: trees[i][1] / trees[i][0], reverse=True):
        size, right = trees[place]
        if num_taken + size > most:
            continue
        if (expected + right) / seconds(num_taken + size) > expected / seconds(num_taken) * MARGIN:
            num_taken, expected, taken[place] = num_taken + size, expected + right, True
    return taken


def least_chance(num_seqs: int, seconds: Callable[[int, int], float], most: int) -> float:
    """The highest chance with which no drafted token pays: where no draft has a better one, `allocate` takes nothing.
    As if all tokens were the first of a draft; else they would bring less."""
    alone = num_seqs / seconds(0, 0) * MARGIN
    numbers = (num for num in range(1, most + 1) if is_common(num_seqs + num))
    return min(((alone * seconds(num, 1) - num_seqs) / num for num in numbers), default=1.0)
