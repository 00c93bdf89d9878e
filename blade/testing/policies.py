"""Kits for drafters and logits processors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from blade.config import EngineConfig
from blade.contracts import Drafter, DraftHead, DraftModel, LogitsProcessor, Tokenizer
from blade.engine.trees import MOST_IDS
from blade.testing.require import require
from blade.types import Draft, SamplingParams, Sequence

_HISTORIES = [[7], [1, 2, 3, 4, 1, 2, 3], [5] * 40, list(range(64))]


def check_drafter(
    factory: Callable[..., Drafter],
    vocab_size: int = 260,
    draft_model: DraftModel | DraftHead | None = None,
    hidden_size: int = 0,
) -> None:
    """One draft per sequence, within the limits and the vocabulary, however the output goes on; the sequences are left
    as they were, and may be forgotten at any time. Of a contracts.TreeDrafter: trees that are some, and it is told what
    was sampled along them. `hidden_size`: of a model, for a drafter that reads hidden states: some of which never come,
    and some come again."""
    drafter = _Shown(factory(EngineConfig(), draft_model), hidden_size)
    require(drafter.propose([], []) == [], "no sequences must give no drafts")
    seqs = [
        Sequence(i, history[:-1] or history, SamplingParams(max_tokens=64), output_ids=history[-1:])
        for i, history in enumerate(_HISTORIES)
    ]
    for turn, limits in enumerate(([4, 0, 1, 4], [0, 0, 0, 0], [4, 4, 4, 4], [1, 2, 0, 8])):
        _check_proposals(drafter, seqs, limits, vocab_size)
        for seq in seqs[turn % 2 :]:
            seq.output_ids += [turn, 1, 2][: 1 + turn]
    for num_right in (1, 2, 4):  # the output goes on as it was drafted, and not for the whole of the draft
        for seq, draft in zip(seqs, _check_proposals(drafter, seqs, [4] * len(seqs), vocab_size), strict=True):
            seq.output_ids += draft.ids[:num_right]
    drafter.forget(seqs[0])
    _check_proposals(drafter, seqs[1:], [4, 4, 4], vocab_size)
    for seq in seqs[1:]:
        drafter.forget(seq)
    drafter.forget(seqs[1])
    _check_proposals(drafter, seqs[:1], [4], vocab_size)


class _Shown:
    """The drafter, and before each call the hidden states it reads: random ones, with others between."""

    def __init__(self, drafter: Drafter, hidden_size: int) -> None:
        self._drafter, self._hidden_size = drafter, hidden_size
        self.states = getattr(drafter, "hidden_states", ())
        require(bool(hidden_size) or not self.states, "say with hidden_size how wide the states are that it reads")
        self._ends: dict[int, int] = {}

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        if self.states and seqs:
            self._show(seqs)
        drafts = self._drafter.propose(seqs, limits)
        for seq, draft in zip(seqs, drafts, strict=False):
            if isinstance(draft, Draft) and draft.parents is not None:
                _check_tree(self._drafter, seq, draft.ids, draft.parents)
        return drafts

    def _show(self, seqs: Seq[Sequence]) -> None:
        import torch

        starts = [max(0, self._ends.get(seq.id, seq.id) - seq.id) for seq in seqs]
        spans = [range(start, seq.num_tokens - 1) for start, seq in zip(starts, seqs, strict=True)]
        self._ends |= {seq.id: span.stop for seq, span in zip(seqs, spans, strict=True)}
        rows = [0]
        for span in spans:
            rows.append(rows[-1] + len(span) + 1)
        width = len(self.states) * self._hidden_size
        hidden = torch.randn(rows.pop(), width, generator=torch.Generator().manual_seed(len(seqs)))
        self._drafter.observe(seqs, spans, rows, hidden)  # type: ignore[attr-defined]
        hidden.fill_(torch.nan)  # as the next step may

    def forget(self, seq: Sequence) -> None:
        self._ends.pop(seq.id, None)
        self._drafter.forget(seq)


def _check_tree(drafter: Any, seq: Sequence, ids: list[int], parents: list[int]) -> None:
    """A tree is one, and the drafter bears to be told what was sampled along it: all of it, or what is left of it."""
    require(getattr(drafter, "trees", False) is True, "a tree comes from a drafter whose attribute `trees` is True")
    require(1 <= drafter.tree_size <= MOST_IDS, f"tree_size is {drafter.tree_size}, not from 1 to {MOST_IDS}")
    is_tree = len(parents) == len(ids) and all(-1 <= parent < i for i, parent in enumerate(parents))
    require(is_tree, f"parents must be one for each id, -1 or the place of an id before it: {parents}")
    size = len(ids) - seq.num_tokens % 2 * (len(ids) // 3)
    seq.draft_ids, seq.draft_parents = ids[:size], parents
    drafter.sampled(seq, [ids[0], *ids[:size]] if size else [0])
    require(seq.draft_ids == ids[:size], "the drafter changed a sequence; it is only told what was sampled")
    seq.draft_ids, seq.draft_parents = [], None


def _check_proposals(drafter: Drafter, seqs: list[Sequence], limits: list[int], vocab_size: int) -> list[Draft]:
    before = [(list(s.prompt_ids), list(s.output_ids), list(s.draft_ids), s.computed) for s in seqs]
    drafts = drafter.propose(seqs, limits)
    require(len(drafts) == len(seqs), f"{len(seqs)} sequences, {len(drafts)} drafts")
    for draft, limit in zip(drafts, limits, strict=True):
        require(isinstance(draft, Draft), f"{draft!r} is not a blade.Draft")
        ids = draft.ids
        require(len(ids) <= limit, f"{len(ids)} ids proposed where {limit} were asked for")
        require(all(type(i) is int and 0 <= i < vocab_size for i in ids), f"not ids of the vocabulary: {ids}")
    after = [(s.prompt_ids, s.output_ids, s.draft_ids, s.computed) for s in seqs]
    require(before == after, "the drafter changed a sequence; proposing is all it may do")
    return drafts


def check_logits_processor(
    factory: Callable[[Any, Tokenizer], LogitsProcessor], arguments: Any, tokenizer: Tokenizer
) -> None:
    """It works in place, leaves something to sample, and does not touch the ids or the arguments."""
    import torch

    untouched = copy.deepcopy(arguments)
    processor = factory(arguments, tokenizer)
    require(arguments == untouched, "the factory changed its arguments")
    for output_ids in ([], [1], [1, 2, 3] * 5):
        logits = torch.linspace(-4, 4, tokenizer.vocab_size)
        seen = list(output_ids)
        returned: Any = processor(seen, logits)  # type: ignore[func-returns-value]
        require(returned is None, "a processor changes the logits in place and returns nothing")
        require(seen == output_ids, "the processor changed output_ids")
        require(not bool(logits.isnan().any()), "the processor made a NaN")
        require(bool((logits > -torch.inf).any()), "the processor left no token to sample")
