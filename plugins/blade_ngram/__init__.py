"""The drafter "ngram": prompt lookup decoding (Saxena 2023). The last few tokens are looked up in the sequence itself;
what followed them there is proposed."""

from collections.abc import Sequence as Seq
from typing import Any

from blade import Draft, EngineConfig, Sequence, hookimpl

LONGEST, SHORTEST = 4, 2  # tokens that have to be alike
TOKENS_PER_CALL = 8192  # indexed before a step, under 1 us each: a long prompt is taken in over several steps


class Index:
    """Where each n-gram of a sequence was last followed by something."""

    def __init__(self) -> None:
        self.num_tokens = 0  # taken in
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> position after it


class NgramDrafter:
    """contracts.Drafter."""

    def __init__(self, config: EngineConfig, draft_model: object) -> None:
        self._indexes: dict[int, Index] = {}  # by id of the sequence

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        budget = TOKENS_PER_CALL
        drafts = []
        for seq, limit in zip(seqs, limits, strict=True):
            index = self._indexes.setdefault(seq.id, Index())
            budget -= _take_in(index, seq, budget)
            drafts.append(_look_up(index, seq, limit) if limit else Draft())
        return drafts

    def forget(self, seq: Sequence) -> None:
        self._indexes.pop(seq.id, None)


def _take_in(index: Index, seq: Sequence, budget: int) -> int:
    """Index all n-grams that have a token after them, at most `budget` more tokens; how many."""
    stop = min(seq.num_tokens, index.num_tokens + max(budget, 0))
    start = max(0, index.num_tokens - LONGEST)
    ids = seq.tokens(start, stop)
    for end in range(index.num_tokens, stop):
        for size in range(SHORTEST, min(LONGEST, end) + 1):
            index.ends[tuple(ids[end - size - start : end - start])] = end
    num_new, index.num_tokens = stop - index.num_tokens, stop
    return num_new


def _look_up(index: Index, seq: Sequence, limit: int) -> Draft:
    num = seq.num_tokens
    if index.num_tokens < num:
        return Draft()  # its prompt is still being taken in
    last = tuple(seq.tokens(max(0, num - LONGEST), num))
    for size in range(len(last), SHORTEST - 1, -1):
        if (found := index.ends.get(last[-size:])) is not None:
            return Draft(seq.tokens(found, min(num, found + limit)), evidence=size)
    return Draft()


@hookimpl
def register_drafters(register: Any) -> None:
    register("ngram", NgramDrafter)
