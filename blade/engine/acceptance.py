"""How likely a drafted token is to be accepted, learnt from what the model said in its place.

Verification keeps exactly what the model would have said anyway. So a draft can be judged whether it was verified or
not: by comparing it with the tokens that come next. Guesses that were not worth verifying teach for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blade.engine.trees import ROOT, child

if TYPE_CHECKING:
    from blade.types import Draft, Sequence

POOL_WEIGHT, SEQ_WEIGHT = 2.0, 1.5  # trials that the prior, and that the pool of all sequences, count for
POOL_KEEP, SEQ_KEEP = 0.98, 0.85  # what is left of old trials after each new one

Kind = tuple[str, int]  # drafts of one source and evidence


@dataclass(slots=True)
class Tally:
    """Of a geometric distribution: tokens accepted, and tokens judged (those after the first wrong one are not). Of
    trees: tokens accepted, and trees."""

    accepted: float = 0.0
    judged: float = 0.0

    def add(self, accepted: int, judged: int, keep: float) -> None:
        old = keep**judged
        self.accepted = self.accepted * old + accepted
        self.judged = self.judged * old + judged

    def estimate(self, prior: float, weight: float) -> float:
        return (self.accepted + prior * weight) / (self.judged + weight)


@dataclass(slots=True)
class Watched:
    """A draft on its way to being judged."""

    draft: Draft
    start: int  # output tokens there were when it was proposed
    num_right: int = 0
    node: int = ROOT  # the last that was right


class Acceptance:
    """The share of drafted tokens that come true, per kind of draft and per sequence."""

    def __init__(self) -> None:
        self._pools: dict[Kind, Tally] = {}
        self._tallies: dict[int, dict[Kind, Tally]] = {}  # by id of the sequence
        self._watched: dict[int, Watched] = {}  # one at a time of each sequence

    def of(self, seq_id: int, kind: Kind, prior: float) -> float:
        """The chance of each further token of such a draft, if those before it were right; of a tree, how many of its
        tokens are right."""
        pool = self._pools.get(kind, _NONE).estimate(prior, POOL_WEIGHT)
        return self._tallies.get(seq_id, {}).get(kind, _NONE).estimate(pool, SEQ_WEIGHT)

    def watch(self, seq: Sequence, draft: Draft) -> None:
        """Judge this draft as its sequence goes on, unless another is being judged."""
        if seq.id not in self._watched:
            self._watched[seq.id] = Watched(draft, len(seq.output_ids))

    def look(self, seq: Sequence) -> None:
        """The sequence has new output."""
        watched = self._watched.get(seq.id)
        if watched is None:
            return
        draft = watched.draft
        for token_id in seq.output_ids[watched.start + watched.num_right :]:
            node = child(draft.ids, draft.parents, watched.node, token_id)
            if node is None:
                break
            watched.node = node
            watched.num_right += 1
        if len(seq.output_ids) > watched.start + watched.num_right or watched.num_right == len(draft.ids):
            self._judge(seq.id, watched)

    def forget(self, seq: Sequence) -> None:
        self._tallies.pop(seq.id, None)
        self._watched.pop(seq.id, None)

    def _judge(self, seq_id: int, watched: Watched) -> None:
        del self._watched[seq_id]
        draft, kind = watched.draft, (watched.draft.source, watched.draft.evidence)
        judged = min(watched.num_right + 1, len(draft.ids)) if draft.parents is None else 1
        self._pools.setdefault(kind, Tally()).add(watched.num_right, judged, POOL_KEEP)
        own = self._tallies.setdefault(seq_id, {}).setdefault(kind, Tally())
        own.add(watched.num_right, judged, SEQ_KEEP)


_NONE = Tally()
