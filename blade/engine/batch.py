"""From a scheduler's step to the flat tensors of one ragged batch."""

from __future__ import annotations

from array import array
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from blade.engine.trees import ancestors, depths, tree_of
from blade.types import Batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from blade.types import Sequence, Step


def build_batch(
    step: Step, block_size: int, to_device: Callable[[torch.Tensor], torch.Tensor], states: bool = False
) -> Batch:
    """Lay the step's owed tokens end to end. A sequence whose last token is in the step gets logits rows: one for that
    token, and one for each draft before it. `states`: the model has recurrent layers."""
    ids, positions, slots, rows, seen = array("q"), array("q"), array("q"), array("q"), array("q")
    trees = [tree_of(seq) for seq in step.seqs]
    any_trees = any(trees)
    for seq, num_tokens, parents in zip(step.seqs, step.num_tokens, trees, strict=True):
        span = range(seq.computed, seq.computed + num_tokens)
        ids.extend(seq.tokens(span.start, span.stop))
        if parents:  # the sequence owes one token beside its draft
            positions.extend(seq.computed + depth for depth in depths(parents)[:num_tokens])
            seen.extend(ancestors(parents)[:num_tokens])
        else:
            positions.extend(span)
            seen.extend([0] * num_tokens if any_trees else [])
        slots.extend(seq.blocks[i // block_size] * block_size + i % block_size for i in span)
        rows.extend(range(len(ids) - num_rows(seq, num_tokens), len(ids)))
    starts = array("i", accumulate(step.num_tokens, initial=0))
    kv_lens = [seq.computed + num_tokens for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True)]
    longs = _joined([ids, positions, slots, rows, seen], torch.int64, to_device)
    slot_lists = ([seq.state for seq in step.seqs], [seq.next_state for seq in step.seqs]) if states else ()
    state_slots = [array("i", slots) for slots in slot_lists]
    ints = _joined([starts, array("i", kv_lens), _block_tables(step.seqs), *state_slots], torch.int32, to_device)
    return Batch(
        input_ids=longs[0],
        positions=longs[1],
        slots=longs[2],
        logits_rows=longs[3],
        cu_seqlens=ints[0],
        context_lens=ints[1],
        block_tables=ints[2].view(len(step), -1),
        query_lens=list(step.num_tokens),
        kv_lens=kv_lens,
        state_in=ints[3] if states else None,
        state_out=ints[4] if states else None,
        ancestors=longs[4] if any_trees else None,
    )


def build_decodes(
    seqs: list[Sequence],
    positions: Seq[int],
    ids: torch.Tensor,
    block_size: int,
    to_device: Callable[[torch.Tensor], torch.Tensor],
) -> Batch:
    """One token of each sequence, positions[i] of seqs[i], after all those before it. Its ids [B] are on the device."""
    num = len(seqs)
    places = zip(seqs, positions, strict=True)
    slots = array("q", [seq.blocks[i // block_size] * block_size + i % block_size for seq, i in places])
    longs = _joined([array("q", positions), slots, array("q", range(num))], torch.int64, to_device)
    kv_lens = [position + 1 for position in positions]
    parts = [array("i", range(num + 1)), array("i", kv_lens), _block_tables(seqs)]
    ints = _joined(parts, torch.int32, to_device)
    return Batch(
        input_ids=ids,
        positions=longs[0],
        slots=longs[1],
        logits_rows=longs[2],
        cu_seqlens=ints[0],
        context_lens=ints[1],
        block_tables=ints[2].view(num, -1),
        query_lens=[1] * num,
        kv_lens=kv_lens,
    )


def _joined(
    parts: list[array[int]], dtype: torch.dtype, to_device: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The parts as tensors that were one while they went to the device."""
    whole = array(parts[0].typecode)
    for part in parts:
        whole.extend(part)
    return to_device(torch.frombuffer(whole, dtype=dtype)).split_with_sizes([len(part) for part in parts])


def num_rows(seq: Sequence, num_tokens: int) -> int:
    """How many of the sequence's num_tokens owed tokens have a next token to be sampled."""
    return 1 + len(seq.draft_ids) if num_tokens == seq.num_owed else 0


def _block_tables(seqs: list[Sequence]) -> array[int]:
    """[B, max_blocks], padded with 0."""
    width = max(len(seq.blocks) for seq in seqs)
    tables = array("i", bytes(4 * width * len(seqs)))
    for row, seq in enumerate(seqs):
        tables[row * width : row * width + len(seq.blocks)] = array("i", seq.blocks)
    return tables
