"""From a scheduler's step to the flat tensors of one ragged batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.types import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from blade.types import Sequence, Step


def build_batch(step: Step, block_size: int, to_device: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """Lay the step's owed tokens end to end. A sequence whose last token is in the step gets logits rows: one for that
    token, and one for each draft before it."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    starts = [0]
    for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True):
        ids += seq.tokens(seq.computed, seq.computed + num_tokens)
        positions += range(seq.computed, seq.computed + num_tokens)
        starts.append(len(ids))
        rows += range(len(ids) - num_rows(seq, num_tokens), len(ids))
    kv_lens = [seq.computed + num_tokens for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True)]
    tables = _block_tables(step.seqs)
    position = torch.tensor(positions, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(step)), torch.tensor(step.num_tokens))
    slots = tables[owner, position // block_size].long() * block_size + position % block_size
    return Batch(
        input_ids=to_device(torch.tensor(ids, dtype=torch.int64)),
        positions=to_device(position),
        slots=to_device(slots),
        cu_seqlens=to_device(torch.tensor(starts, dtype=torch.int32)),
        context_lens=to_device(torch.tensor(kv_lens, dtype=torch.int32)),
        block_tables=to_device(tables),
        logits_rows=to_device(torch.tensor(rows, dtype=torch.int64)),
        query_lens=list(step.num_tokens),
        kv_lens=kv_lens,
    )


def num_rows(seq: Sequence, num_tokens: int) -> int:
    """How many of the sequence's num_tokens owed tokens have a next token to be sampled."""
    return 1 + len(seq.draft_ids) if num_tokens == seq.num_owed else 0


def _block_tables(seqs: list[Sequence]) -> torch.Tensor:
    width = max(len(seq.blocks) for seq in seqs)
    return torch.tensor([seq.blocks + [0] * (width - len(seq.blocks)) for seq in seqs], dtype=torch.int32)
