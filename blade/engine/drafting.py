"""The drafters in their order: each is asked for those that the ones before it had no idea for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blade.types import Draft, DrafterStats

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.contracts import Drafter
    from blade.types import Sequence

log = logging.getLogger("blade.engine")

LEARN = 1.1  # the most that one call moves what is believed of a drafter's price


@dataclass(slots=True)
class Price:
    """Seconds a call of a drafter takes."""

    call: float = 0.0
    per_depth: float = 0.0  # of it, by the tokens of the longest draft: a model makes one token of all drafts at a time

    def learn(self, seconds: float, depth: int) -> None:
        self.call = _towards(self.call, seconds)
        if depth:
            self.per_depth = _towards(self.per_depth, seconds / depth)


class GuardedDrafter:
    """A drafter under its name, timed, counted and held to its contract: what it gets wrong costs speed alone."""

    def __init__(self, name: str, drafter: Drafter, vocab_size: int) -> None:
        self.name = name
        self.price = Price()
        self.stats = DrafterStats(name)
        self._drafter: Drafter | None = drafter
        self._vocab_size = vocab_size

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        """One draft per sequence; empty ones from a drafter that has failed, which is never asked again."""
        if self._drafter is None or not any(limits):
            return [Draft()] * len(seqs)
        started = time.perf_counter()
        try:
            drafts = self._checked(self._drafter.propose(seqs, limits), limits)
        except Exception:  # a draft is only ever a guess: go on without
            log.exception("the drafter %r failed; it is off from now on", self.name)
            self._drafter = None
            return [Draft()] * len(seqs)
        seconds = time.perf_counter() - started
        self.price.learn(seconds, max(len(draft.ids) for draft in drafts))
        self._count(calls=1, seconds=seconds, tokens_proposed=sum(len(draft.ids) for draft in drafts))
        return drafts

    def verified(self, num_tokens: int, num_accepted: int) -> None:
        self._count(tokens_verified=num_tokens, tokens_accepted=num_accepted, drafts_verified=1)

    def forget(self, seq: Sequence) -> None:
        if self._drafter is not None:
            try:
                self._drafter.forget(seq)
            except Exception:
                log.exception("the drafter %r could not forget sequence %d; it is off from now on", self.name, seq.id)
                self._drafter = None

    def _checked(self, drafts: list[Draft], limits: Seq[int]) -> list[Draft]:
        if len(drafts) != len(limits):
            raise ValueError(f"{len(drafts)} drafts for {len(limits)} sequences")
        for draft, limit in zip(drafts, limits, strict=True):
            if len(draft.ids) > limit:
                raise ValueError(f"{len(draft.ids)} ids were proposed where {limit} were asked for")
        return [self._named(draft) for draft in drafts]

    def _named(self, draft: Draft) -> Draft:
        """With its source, up to the first id that the model does not have (a draft model's vocabulary may be padded
        more widely)."""
        ids = draft.ids
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            ids = ids[: next(i for i, token_id in enumerate(ids) if not 0 <= token_id < self._vocab_size)]
        return Draft(list(ids), draft.evidence, self.name)

    def _count(self, **more: float) -> None:
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + num for name, num in more.items()})


def _towards(old: float, new: float) -> float:
    return min(max(new, old / LEARN), old * LEARN) if old else new
