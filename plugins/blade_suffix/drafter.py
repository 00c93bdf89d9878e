"""Drafts from what was said before: in the sequence's own text, in what its client predicted, and in earlier replies
to the same tenant.

After Hu et al. 2024 (SAM decoding) and Oliaro et al. 2024 (SuffixDecoding): the text goes on as it did after the last
place that ended alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from blade import Draft, Sequence
from blade_suffix.automaton import SuffixAutomaton

TOKENS_PER_CALL = 2048  # indexed before a step, some 3 us each: a long prompt is taken in over several steps
TOKENS_OF_POOL = 32768  # of a tenant's earlier replies; as many older ones are searched as well
MAX_POOLS = 64  # tenants; the one that was quiet for longest is forgotten
CONTEXT = 16  # last tokens looked for in the pool
STRONGEST = 6  # evidence of a match of 32 tokens and more


class Pool:
    """Earlier replies to one tenant, bounded: the newer half and the older half."""

    def __init__(self) -> None:
        self.halves = [SuffixAutomaton()]

    def add(self, reply: list[int]) -> None:
        if len(self.halves[0]) + len(reply) > TOKENS_OF_POOL and len(self.halves[0]):
            self.halves = [SuffixAutomaton(), self.halves[0]]
        for token in reply[:TOKENS_OF_POOL]:
            self.halves[0].append(token)

    def draft(self, context: list[int], limit: int) -> tuple[int, list[int]]:
        """(tokens matched, what followed them), of the better half."""
        found = [(*half.find(context), half) for half in self.halves]
        length, end, half = max(found, key=lambda item: item[0])
        return length, half.after(end, limit) if length else []


class SuffixDrafter:
    """contracts.Drafter."""

    def __init__(self) -> None:
        self._own: dict[int, SuffixAutomaton] = {}  # by id of the sequence
        self._pools: OrderedDict[bytes, Pool] = OrderedDict()  # by namespace, the one used last at the end

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        budget = TOKENS_PER_CALL
        drafts = []
        for seq, limit in zip(seqs, limits, strict=True):
            budget -= self._index(seq, budget)
            drafts.append(self._draft(seq, limit) if limit else Draft())
        return drafts

    def forget(self, seq: Sequence) -> None:
        self._own.pop(seq.id, None)
        if seq.output_ids:
            pool = self._pools.setdefault(seq.namespace, Pool())
            self._pools.move_to_end(seq.namespace)
            pool.add(seq.output_ids)
            if len(self._pools) > MAX_POOLS:
                self._pools.popitem(last=False)

    def _index(self, seq: Sequence, budget: int) -> int:
        """Take new tokens in, at most `budget`; how many."""
        own, budget = self._own.setdefault(seq.id, SuffixAutomaton()), max(budget, 0)
        # The text begins with what the client expects the output to be.
        predicted = seq.prediction_ids[len(own) : len(own) + budget]
        start = max(0, len(own) - len(seq.prediction_ids))
        new = [*predicted, *seq.tokens(start, min(seq.num_tokens, start + budget - len(predicted)))]
        for token in new:
            own.append(token)
        return len(new)

    def _draft(self, seq: Sequence, limit: int) -> Draft:
        own = self._own[seq.id]
        if len(own) < len(seq.prediction_ids) + seq.num_tokens:
            return Draft()  # its prompt is still being taken in
        length, ids = own.match_length, []
        if length:
            ids = own.after(own.match_end, limit)
        pool = self._pools.get(seq.namespace)
        if pool is not None and length < CONTEXT:
            elsewhere, others = pool.draft(seq.tokens(max(0, seq.num_tokens - CONTEXT), seq.num_tokens), limit)
            if elsewhere > length and others:
                length, ids = elsewhere, others
        return Draft(ids, min(STRONGEST, length.bit_length())) if ids else Draft()
