"""Kits for drafters and logits processors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from blade.config import EngineConfig
from blade.contracts import Drafter, LogitsProcessor, Tokenizer
from blade.testing.require import require
from blade.types import SamplingParams, Sequence

_HISTORIES = [[7], [1, 2, 3, 4, 1, 2, 3], [5] * 40, list(range(64))]


def check_drafter(factory: Callable[[EngineConfig], Drafter], vocab_size: int = 260) -> None:
    """One proposal per sequence, within max_tokens and the vocabulary, and the sequences are left as they were."""
    drafter = factory(EngineConfig())
    require(drafter.propose([], 4) == [], "no sequences must give no proposals")
    for max_tokens in (0, 1, 4):
        seqs = [
            Sequence(i, history[:-1] or history, SamplingParams(max_tokens=64), output_ids=history[-1:])
            for i, history in enumerate(_HISTORIES)
        ]
        before = [(list(s.prompt_ids), list(s.output_ids), list(s.draft_ids), s.computed) for s in seqs]
        drafts = drafter.propose(seqs, max_tokens)
        require(len(drafts) == len(seqs), f"{len(seqs)} sequences, {len(drafts)} proposals")
        for draft in drafts:
            require(len(draft) <= max_tokens, f"{len(draft)} ids proposed where {max_tokens} were asked for")
            require(all(type(i) is int and 0 <= i < vocab_size for i in draft), f"not ids of the vocabulary: {draft}")
        after = [(s.prompt_ids, s.output_ids, s.draft_ids, s.computed) for s in seqs]
        require(before == after, "the drafter changed a sequence; proposing is all it may do")


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
