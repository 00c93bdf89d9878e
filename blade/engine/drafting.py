"""The drafters in their order: each is asked for those that the ones before it had no idea for."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blade.engine.reading import Reading
from blade.engine.trees import MOST_IDS, ROOT, tree_of
from blade.types import Draft, DrafterStats, Sampled

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Drafter
    from blade.types import Sequence

log = logging.getLogger("blade.engine")

LEARN = 1.1  # the most that one call moves what is believed of a drafter's price


MOST_EVIDENCE = 15  # grades: each has chances of its own, which are kept for ever
MANY = 64  # tokens that a drafter has not seen yet: taking them in is most of a call's time


@dataclass(slots=True)
class Price:
    """Seconds that a drafter takes."""

    per_seq: float = 0.0  # of a call, by the sequences asked for, without what is new of them
    per_depth: float = 0.0  # of a call, by the tokens of the longest draft: a model makes one token of all at a time
    per_new: float = 0.0  # for each token of a sequence that it has not seen yet, prompts above all

    def learn(self, seconds: float, num_seqs: int, depth: int, num_new: int) -> None:
        if num_new >= MANY:
            self.per_new = _towards(self.per_new, max(0.0, seconds - depth * self.per_depth) / num_new)
            return
        self.per_seq = _towards(self.per_seq, max(0.0, seconds - num_new * self.per_new) / num_seqs)
        if depth:
            self.per_depth = _towards(self.per_depth, seconds / depth)


class GuardedDrafter:
    """A drafter under its name, timed, counted and held to its contract: what it gets wrong costs speed alone."""

    def __init__(self, name: str, drafter: Drafter, vocab_size: int) -> None:
        self.name = name
        self.price = Price()
        self.reading = Reading()
        self._counts: defaultdict[str, Any] = defaultdict(int)  # by the names of DrafterStats
        self._drafter: Drafter | None = drafter
        self._num_seen: dict[int, int] = {}  # by id of the sequence: its tokens at the last call
        self._vocab_size = vocab_size

    @property
    def stats(self) -> DrafterStats:
        return DrafterStats(self.name, enabled=self._drafter is not None, **self._counts)

    @property
    def seconds(self) -> float:
        """That it has taken so far."""
        return float(self._counts["seconds"])

    def num_new(self, seq: Sequence) -> int:
        """Tokens of the sequence that came since the drafter was last asked for it."""
        return seq.num_tokens - self._num_seen.get(seq.id, 0)

    def has_seen(self, seq: Sequence) -> bool:
        return seq.id in self._num_seen

    @property
    def tree_size(self) -> int:
        """Of its largest tree; 0, if it is no contracts.TreeDrafter."""
        return min(MOST_IDS, getattr(self._drafter, "tree_size", 0))

    @property
    def hidden_states(self) -> Seq[int]:
        """Those that it reads; none of them, if it is no contracts.HiddenReader."""
        return getattr(self._drafter, "hidden_states", ())

    def observe(self, seqs: Seq[Sequence], spans: Seq[range], rows: Seq[int], hidden: Tensor) -> None:
        """As contracts.HiddenReader, of those of all sequences of a step that it is shown."""
        shown = self.reading.chosen(seqs)
        if self._drafter is None or not shown:
            return
        started = time.perf_counter()
        try:
            parts = ([items[i] for i in shown] for items in (seqs, spans, rows))
            self._drafter.observe(*parts, hidden)  # type: ignore[attr-defined]
        except Exception:
            log.exception("the drafter %r failed to read hidden states; it is off from now on", self.name)
            self._drafter = None
        seconds = time.perf_counter() - started
        self.reading.spend(seconds)
        self._count(seconds=seconds)

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
        asked = [seq for seq, limit in zip(seqs, limits, strict=True) if limit]
        depth, num_new = max(len(draft.ids) for draft in drafts), sum(map(self.num_new, asked))
        if depth or not self.hidden_states:  # without these it had nothing to go on from, which says nothing of a price
            self.price.learn(seconds, len(asked), depth, num_new)
        self.reading.ask(asked)
        self._num_seen |= {seq.id: seq.num_tokens for seq in asked}
        self._count(calls=1, seconds=seconds, tokens_proposed=sum(len(draft.ids) for draft in drafts))
        return drafts

    def sampled(self, seqs: Seq[Sequence], sampled: Seq[Seq[Sampled | Exception]]) -> None:
        """As contracts.TreeDrafter, of all sequences of a step; nothing is sampled of some."""
        if not self.tree_size:
            return
        started = time.perf_counter()
        try:
            for seq, tokens in zip(seqs, sampled, strict=True):
                ids = [token.token_id for token in tokens if isinstance(token, Sampled)]
                if tree_of(seq) is not None and len(ids) == 1 + len(seq.draft_ids):
                    self._drafter.sampled(seq, ids)  # type: ignore[union-attr]
        except Exception:
            log.exception("the drafter %r failed to take what was sampled; it is off from now on", self.name)
            self._drafter = None
        self._count(seconds=time.perf_counter() - started)

    def verified(self, num_tokens: int, num_accepted: int) -> None:
        self._count(tokens_verified=num_tokens, tokens_accepted=num_accepted, drafts_verified=1)

    def forget(self, seq: Sequence) -> None:
        self._num_seen.pop(seq.id, None)
        self.reading.forget(seq)
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
            if draft.parents is not None:
                self._check_tree(draft.ids, draft.parents)
        return [self._named(draft) for draft in drafts]

    def _named(self, draft: Draft) -> Draft:
        """With its source, up to the first id that the model does not have (a draft model's vocabulary may be padded
        more widely)."""
        ids = draft.ids
        if not ids:
            return Draft()
        if not 0 <= min(ids) <= max(ids) < self._vocab_size:
            ids = ids[: next(i for i, token_id in enumerate(ids) if not 0 <= token_id < self._vocab_size)]
        parents = None if draft.parents is None else draft.parents[: len(ids)]
        return Draft(list(ids), max(0, min(draft.evidence, MOST_EVIDENCE)), self.name, parents)

    def _check_tree(self, ids: Seq[int], parents: Seq[int]) -> None:
        if not self.tree_size:
            raise ValueError("a tree was proposed by a drafter without a tree_size")
        if len(parents) != len(ids) or any(not ROOT <= parent < i for i, parent in enumerate(parents)):
            raise ValueError("the parents of a tree's ids must be one for each, -1 or the place of an id before it")

    def start_anew(self) -> None:
        """Nothing has been proposed yet."""
        self._counts.clear()

    def _count(self, **more: float) -> None:
        for name, num in more.items():
            self._counts[name] += num


def _towards(old: float, new: float) -> float:
    return min(max(new, old / LEARN), old * LEARN) if old else new
