"""The step to come, as it is seen while it is decided what is drafted for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from blade.engine.allocation import allocate, allocate_trees, least_chance
from blade.engine.costs import MOST_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.engine.budget import Budget, Shapes
    from blade.engine.costs import StepCosts

Offer = tuple[int, float]  # drafted tokens there are, and the chance of each further one; of a tree, how many are right
NOTHING: Offer = (0, 0.0)


class ComingStep:
    """Decodes of `num_seqs` sequences, and what may be verified beside them."""

    def __init__(
        self,
        costs: StepCosts,
        shapes: Shapes,
        budget: Budget,
        num_seqs: int,
        with_prompts: bool = False,
        since: float | None = None,
    ) -> None:
        """`with_prompts`: it has chunks of prompts as well, so that every token has its full price. `since`: seconds of
        this step and of those before it that nobody has seen; None: there are none."""
        self.costs = costs
        self.num_seqs = num_seqs
        self.alone = costs.seconds(num_seqs)  # seconds without drafts
        self.since = self.alone if since is None else since
        self.with_prompts = with_prompts
        self._budget = budget
        self._shapes = shapes

    @property
    def per_seq(self) -> float:
        """Seconds that a token takes without drafts."""
        return self.alone / self.num_seqs

    def seconds(self, num_drafted: int) -> float:
        if self.with_prompts:
            return self.alone + num_drafted * self.costs.per_token
        return self.costs.seconds(self.num_seqs + num_drafted)

    def least_chance(self, max_tokens: int) -> float:
        """The chance above which a token of a draft of at most `max_tokens` may pay; see there."""
        most = min(self.num_seqs * max_tokens, MOST_TOKENS - self.num_seqs)
        return least_chance(self.num_seqs, lambda num, _: self.seconds(num), most)

    def allocate(self, offers: Seq[Offer], per_depth: float = 0.0) -> list[int]:
        """How many tokens of the offers, one for each sequence, are worth their time. `per_depth`: seconds that a
        drafter takes for each token of the longest draft."""
        if not any(length for length, _ in offers):
            return [0] * self.num_seqs
        most = max(0, MOST_TOKENS - self.num_seqs)
        return allocate(offers, lambda num, depth: self._within_budget(num) + depth * per_depth, most)

    def allocate_trees(self, trees: Seq[Offer], offers: Seq[Offer], lengths: Seq[int]) -> list[bool]:
        """Which of the trees are worth their time beside what was allocated of the offers."""
        taken = zip(offers, lengths, strict=True)
        expected = sum(sum(chance**depth for depth in range(length + 1)) for (_, chance), length in taken)
        most = max(0, MOST_TOKENS - self.num_seqs)
        return allocate_trees(trees, sum(lengths), expected, self._within_budget, most)

    def _within_budget(self, num_drafted: int) -> float:
        """Seconds; without end where losing what they are more than without drafts is more than there is to lose."""
        seconds = self.seconds(num_drafted)
        new = (self._shapes.price or 0.0) if num_drafted and self._is_new(num_drafted) else 0.0
        return seconds if seconds - self.alone + new <= self._budget.seconds else math.inf

    def _is_new(self, num_drafted: int) -> bool:
        return not self.with_prompts and self._shapes.is_new(self.num_seqs, self.num_seqs + num_drafted)
