"""Speculative decoding: which drafts go into a step, and what is learnt from it.

Drafters propose; how much of each draft is verified is decided anew for every sequence and step, from the chance that
its tokens are right (acceptance.py) and from what a step of so many tokens costs (costs.py), down to none at all.
Proposing is weighed as well (asking.py), and so is weighing (rest.py); what all of it may lose is bounded (budget.py).
Verification itself is the engine's ordinary step (verify.py).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from blade.engine.acceptance import Acceptance
from blade.engine.asking import Asking
from blade.engine.budget import Budget, Shapes
from blade.engine.coming_step import NOTHING, ComingStep
from blade.engine.rest import Rest
from blade.types import Draft

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.engine.asking import Asked
    from blade.engine.coming_step import Offer
    from blade.engine.costs import StepCosts
    from blade.engine.drafting import GuardedDrafter
    from blade.types import DrafterStats, Sequence

NO_DRAFT = Draft()
STALL = 2  # times as long as expected: more of a step is the machine's doing
REFRESH = 32  # steps after which it is computed anew what could pay at all


class Speculator:
    """Gives sequences their draft_ids before a step and looks at the outcome after it. The engine thread's own."""

    def __init__(
        self, drafters: Seq[GuardedDrafter], costs: StepCosts | None, max_tokens: int, max_context: int
    ) -> None:
        """`costs`: None verifies whatever is proposed. `max_tokens`: longest draft. `max_context`: tokens."""
        self._costs = costs
        self._max_tokens = max_tokens
        self._max_context = max_context
        self._acceptance = Acceptance()
        self._asking = {drafter.name: Asking(drafter, self._acceptance) for drafter in drafters}
        self._sources: dict[int, str] = {}  # by id of the sequence: whose draft it has now
        self._shapes = Shapes([(1, num) for num in costs.measured], costs.new_shape) if costs else Shapes()
        self._budget = Budget()
        self._spent = 0.0  # seconds of the budget, for drafts of the step that comes, or came
        self._rest = Rest()
        self._resting = False  # nobody thought about the step that comes, or came
        self._per_seq = 0.0  # seconds that a token took without drafts
        self._least: dict[tuple[int, bool], tuple[float, int]] = {}  # chance above which drafts pay; steps it holds for
        if costs is not None:
            for drafter in drafters:
                drafter.reading.limit(costs.seconds(1))

    @property
    def drafters(self) -> tuple[GuardedDrafter, ...]:
        """In the order in which they are asked."""
        return tuple(asking.drafter for asking in self._asking.values())

    @property
    def stats(self) -> tuple[DrafterStats, ...]:
        return tuple(asking.drafter.stats for asking in self._asking.values())

    def draft(self, seqs: Seq[Sequence], with_prompts: bool) -> None:
        """Set the draft_ids of `seqs`, all of the step that only owe their next token. `with_prompts`: the step will
        have chunks of prompts as well."""
        if not seqs:
            return
        if self._costs is None:
            drafts = self._proposed(seqs, None, 0.0)
            self._take(seqs, drafts, [len(drafts.get(seq.id, NO_DRAFT).ids) for seq in seqs])
            return
        self._resting = self._rest.goes_on(self._costs.seconds(len(seqs))) and not any(
            asking.goes_on for asking in self._asking.values()
        )
        if self._resting:
            return
        started, proposing = time.perf_counter(), self._proposing
        step = ComingStep(self._costs, self._shapes, self._budget, len(seqs), with_prompts, self._rest.end())
        if not self._draft_for(step, seqs):
            self._rest.begin(time.perf_counter() - started - (self._proposing - proposing))

    def _draft_for(self, step: ComingStep, seqs: Seq[Sequence]) -> bool:
        """Whether anything was taken."""
        self._spent = 0.0
        self._budget.open(step.alone, step.since, self._shapes.price or 0.0)
        self._per_seq = step.per_seq
        least = self._least_chance(step)
        drafts = self._proposed(seqs, step, least) if least < 1 else {}
        if not drafts:
            return False
        lengths = self._lengths(seqs, drafts, step, least)
        self._spent = step.seconds(sum(lengths)) - step.alone
        self._budget.spend(self._spent)
        self._take(seqs, drafts, lengths)
        return any(lengths)

    @property
    def _proposing(self) -> float:
        """Seconds that drafters have taken: those are bounded elsewhere (turns.py)."""
        return sum(asking.drafter.seconds for asking in self._asking.values())

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int, num_again: int = 0) -> None:
        """Of `num_drafted` tokens, one at least, the model agreed to `num_accepted`, of which it has to compute
        `num_again` once more."""
        drafter, won = self._asking[self._sources[seq.id]].drafter, num_accepted * self._per_seq
        drafter.verified(num_drafted, num_accepted)
        if self._costs is None:
            return
        drafter.reading.gain(self._costs.seconds(1), won=won)
        self._budget.win(won)
        if num_again:
            self._budget.spend(self._costs.seconds(1 + num_again) - self._costs.seconds(1))

    def stepped(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """A step of decodes and verifications alone has taken so long. The first steps of a shape tell nothing but what
        a new shape costs; steps during a rest, nothing that others do not."""
        if self._costs is None:
            return
        for drafter in self.drafters:
            drafter.reading.gain(self._costs.seconds(1), passed=seconds)
        if self._resting:
            return
        is_new, expected = self._shapes.is_new(num_seqs, num_tokens), self._costs.seconds(num_tokens)
        if num_tokens > num_seqs:  # the budget is of what was lost, not of what was expected; stalls are nobody's fault
            lost = (seconds if is_new else min(seconds, STALL * expected)) - self._costs.seconds(num_seqs)
            self._budget.spend(lost - self._spent)
        if is_new:
            self._shapes.learn(seconds - expected)
        else:
            self._costs.learn(num_seqs, num_tokens, seconds)
        self._shapes.add(num_seqs, num_tokens)

    def forget(self, seq: Sequence) -> None:
        self._sources.pop(seq.id, None)
        self._acceptance.look(seq)
        self._acceptance.forget(seq)
        for asking in self._asking.values():
            asking.forget(seq)

    def _proposed(self, seqs: Seq[Sequence], step: ComingStep | None, least: float) -> dict[int, Draft]:
        """Drafts by id of the sequence. `step`: None asks for all; `least`: chance up to which no token pays."""
        drafts: dict[int, Draft] = {}
        for asking in self._asking.values():
            most = asking.drafter.tree_size or self._max_tokens
            rooms = ((seq, self._room(seq, most)) for seq in seqs)
            open_ = [(seq, room) for seq, room in rooms if room and seq.id not in drafts]
            asked: Asked = asking.choose(open_, step, least) if step and open_ else open_
            if not asked:
                continue
            for seq, _ in asked:
                self._acceptance.look(seq)
            proposed = asking.drafter.propose([seq for seq, _ in asked], [room for _, room in asked])
            for (seq, _), draft in zip(asked, proposed, strict=True):
                if draft.ids:
                    drafts[seq.id] = draft
                    self._acceptance.watch(seq, draft)
        return drafts

    def _room(self, seq: Sequence, most: int) -> int:
        """Tokens to draft, at most `most`: the last one that a request may have needs no verification after it."""
        left = seq.params.max_tokens - len(seq.output_ids)
        return max(0, min(most, left - 1, self._max_context - seq.num_tokens - 1))

    def _lengths(self, seqs: Seq[Sequence], drafts: dict[int, Draft], step: ComingStep, least: float) -> list[int]:
        """How much of each draft is worth its time: chains first, then trees beside them."""
        offers = [self._offer(seq, drafts.get(seq.id, NO_DRAFT), step) for seq in seqs]
        places = [i for i, seq in enumerate(seqs) if drafts.get(seq.id, NO_DRAFT).parents is not None]
        trees = [offers[i] for i in places]
        chains = [offer if offer[1] > least else NOTHING for offer in offers]
        for i in places:
            chains[i] = NOTHING
        lengths = step.allocate(chains)
        for i, (size, _), taken in zip(places, trees, step.allocate_trees(trees, chains, lengths), strict=True):
            lengths[i] = size if taken else 0
        return lengths

    def _offer(self, seq: Sequence, draft: Draft, step: ComingStep) -> Offer:
        if not draft.ids:
            return NOTHING
        return len(draft.ids), self._asking[draft.source].chance(seq, draft.evidence, step)

    def _take(self, seqs: Seq[Sequence], drafts: dict[int, Draft], lengths: list[int]) -> None:
        for seq, length in zip(seqs, lengths, strict=True):
            if length:
                draft = drafts[seq.id]
                seq.draft_ids, seq.draft_parents = draft.ids[:length], draft.parents
                self._sources[seq.id] = draft.source
                self._asking[draft.source].paid(seq)

    def _least_chance(self, step: ComingStep) -> float:
        kind = step.num_seqs, step.with_prompts
        least, num_steps = self._least.get(kind, (0.0, 0))
        if not num_steps:
            least, num_steps = step.least_chance(self._max_tokens), REFRESH
        self._least[kind] = least, num_steps - 1
        return least
