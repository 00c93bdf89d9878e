"""Speculative decoding: which drafts go into a step, and what is learnt from it.

Drafters propose; how much of each draft is verified is decided anew for every sequence and step, from the chance that
its tokens are right (acceptance.py) and from what a step of so many tokens costs (costs.py), down to none at all.
Verification itself is the engine's ordinary step (verify.py).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from blade.engine.acceptance import Acceptance
from blade.engine.allocation import allocate
from blade.engine.costs import MOST_TOKENS
from blade.types import Draft

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.engine.costs import StepCosts
    from blade.engine.drafting import GuardedDrafter
    from blade.types import DrafterStats, Sequence

FREE = 0.02  # a drafter that takes no more than this share of a step is always asked
PRIOR_FREE, PRIOR_PAID = 0.2, 0.75  # chances believed in at first: what is not free is never tried without hope
FORESIGHT = 256  # tokens that a sequence is expected to go on for at most
PROBE_SHARE, PROBE_TOKENS = 0.015, 2  # of the time, spent on asking a drafter that did not pay, for so few tokens
FIRST_STEPS = 2


class Speculator:
    """Gives sequences their draft_ids before a step and looks at the outcome after it. The engine thread's own."""

    def __init__(
        self, drafters: Seq[GuardedDrafter], costs: StepCosts | None, max_tokens: int, max_context: int
    ) -> None:
        """`costs`: None verifies whatever is proposed. `max_tokens`: longest draft. `max_context`: tokens."""
        self._drafters = {drafter.name: drafter for drafter in drafters}
        self._costs = costs
        self._max_tokens = max_tokens
        self._max_context = max_context
        self._acceptance = Acceptance()
        self._num_steps: Counter[tuple[int, int]] = Counter()  # by sequences and tokens
        self._sources: dict[int, str] = {}  # by id of the sequence: whose draft it has now
        self._unasked = dict.fromkeys(self._drafters, 0.0)  # seconds of steps since the drafter was last asked

    @property
    def drafters(self) -> tuple[GuardedDrafter, ...]:
        """In the order in which they are asked."""
        return tuple(self._drafters.values())

    @property
    def stats(self) -> tuple[DrafterStats, ...]:
        return tuple(drafter.stats for drafter in self._drafters.values())

    def draft(self, seqs: Seq[Sequence], with_prompts: bool) -> None:
        """Set the draft_ids of `seqs`, all of the step that only owe their next token. `with_prompts`: the step will
        have chunks of prompts as well, so that every token has its full price."""
        rooms = [self._room(seq) for seq in seqs]
        drafts = [Draft()] * len(seqs)
        for drafter in self._drafters.values():
            open_ = [i for i, draft in enumerate(drafts) if rooms[i] and not draft.ids]
            limits = self._worth_asking(drafter, seqs, open_, rooms, with_prompts)
            if not any(limits):
                continue
            self._unasked[drafter.name] = 0.0
            for i, draft in zip(open_, drafter.propose([seqs[i] for i in open_], limits), strict=True):
                if draft.ids:
                    drafts[i] = draft
                    self._acceptance.watch(seqs[i], draft)
        for seq, draft, length in zip(seqs, drafts, self._lengths(seqs, drafts, with_prompts), strict=True):
            seq.draft_ids = draft.ids[:length]
            self._sources[seq.id] = draft.source

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """The sequence has new output; of `num_drafted` tokens the model agreed to the first `num_accepted`."""
        self._acceptance.look(seq)
        if num_drafted:
            self._drafters[self._sources[seq.id]].verified(num_drafted, num_accepted)

    def stepped(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """A step of decodes and verifications alone has taken so long. The first steps of a shape tell little: they
        compile or capture."""
        for name in self._unasked:
            self._unasked[name] += seconds
        shape = num_seqs, num_tokens
        self._num_steps[shape] += 1
        if self._costs is not None and self._num_steps[shape] > FIRST_STEPS:
            self._costs.learn(num_tokens, seconds)

    def forget(self, seq: Sequence) -> None:
        self._sources.pop(seq.id, None)
        self._acceptance.forget(seq)
        for drafter in self._drafters.values():
            drafter.forget(seq)

    def _room(self, seq: Sequence) -> int:
        """Most tokens to draft: the last one that a request may have needs no verification after it."""
        left = seq.params.max_tokens - len(seq.output_ids)
        return max(0, min(self._max_tokens, left - 1, self._max_context - seq.num_tokens - 1))

    def _worth_asking(
        self, drafter: GuardedDrafter, seqs: Seq[Sequence], places: list[int], rooms: list[int], with_prompts: bool
    ) -> list[int]:
        """How many tokens to ask the drafter for, for each of the sequences at `places`."""
        asked = [rooms[i] for i in places]
        if self._costs is None or self._is_free(drafter) or not asked:
            return asked
        offers = [(0, 0.0)] * len(seqs)
        for i, room in zip(places, asked, strict=True):
            chance = self._acceptance.of(seqs[i].id, (drafter.name, 0), PRIOR_PAID)
            if _repays(drafter, self._costs, seqs[i], room, chance, len(seqs)):
                offers[i] = (room, chance)
        taken = self._allocate(offers, with_prompts, drafter.price.per_depth)
        limits = [taken[i] for i in places]
        return limits if any(limits) else self._try_again(drafter, [seqs[i] for i in places], asked)

    def _try_again(self, drafter: GuardedDrafter, seqs: list[Sequence], asked: list[int]) -> list[int]:
        """Ask a drafter that did not pay for a few tokens of one sequence, if that takes a small share of the time
        since it was last asked."""
        price, limits = drafter.price, [0] * len(seqs)
        place = min(range(len(seqs)), key=lambda i: drafter.num_new(seqs[i]))
        seconds = PROBE_TOKENS * price.per_depth + drafter.num_new(seqs[place]) * price.per_new
        if seconds < PROBE_SHARE * self._unasked[drafter.name]:
            limits[place] = min(asked[place], PROBE_TOKENS)
        return limits

    def _lengths(self, seqs: Seq[Sequence], drafts: list[Draft], with_prompts: bool) -> list[int]:
        if self._costs is None:
            return [len(draft.ids) for draft in drafts]
        if not any(draft.ids for draft in drafts):
            return [0] * len(drafts)
        offers = []
        for seq, draft in zip(seqs, drafts, strict=True):
            prior = PRIOR_FREE if draft.source and self._is_free(self._drafters[draft.source]) else PRIOR_PAID
            chance = self._acceptance.of(seq.id, (draft.source, draft.evidence), prior) if draft.ids else 0.0
            offers.append((len(draft.ids), chance))
        return self._allocate(offers, with_prompts, 0.0)

    def _allocate(self, offers: list[tuple[int, float]], with_prompts: bool, per_depth: float) -> list[int]:
        """`per_depth`: seconds a drafter takes for each token of the longest draft."""
        costs, num_seqs = self._costs, len(offers)
        if costs is None:
            return [length for length, _ in offers]

        def seconds(num_tokens: int, depth: int) -> float:
            if with_prompts:
                step = costs.seconds(num_seqs) + num_tokens * costs.per_token
            else:
                step = costs.seconds(num_seqs + num_tokens)
            return step + depth * per_depth

        return allocate(offers, seconds, max(0, MOST_TOKENS - num_seqs))

    def _is_free(self, drafter: GuardedDrafter) -> bool:
        return self._costs is None or drafter.price.call <= FREE * self._costs.seconds(1)


def _repays(drafter: GuardedDrafter, costs: StepCosts, seq: Sequence, room: int, chance: float, num_seqs: int) -> bool:
    """Whether what is left of the sequence is long enough for its gains to outweigh reading it first."""
    price = drafter.price

    def seconds(num_tokens: int, depth: int) -> float:
        """Of a step, what this one sequence is to blame for, and of its draft."""
        alone = costs.seconds(num_seqs)
        return alone / num_seqs + costs.seconds(num_seqs + num_tokens) - alone + depth * price.per_depth

    (length,) = allocate([(room, chance)], seconds, room)
    expected = sum(chance**j for j in range(length + 1))
    saved = seconds(0, 0) - seconds(length, length) / expected  # per token
    num_left = min(seq.params.max_tokens - len(seq.output_ids), FORESIGHT)
    return saved * num_left > drafter.num_new(seq) * price.per_new
