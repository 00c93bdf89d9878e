"""How keys are chosen that a query sees, in plain torch: see contracts.Ops."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from blade.types import Batch, KeySelection

MAX_SCORES = 1 << 23  # queries times heads times groups that are scored together


def keep_index_keys(
    k: Tensor, weight: Tensor, eps: float, cos_sin: Tensor, batch: Batch, kept: Tensor, group: int
) -> None:
    """k [T, D], weight [D], kept [num_blocks, block_size, D]."""
    rows = kept.flatten(0, 1)
    rows.index_copy_(0, batch.slots, k)
    ends = _group_ends(batch, group)
    seqs = torch.tensor([seq for seq, _ in ends], dtype=torch.int64).to(k.device, non_blocking=True)
    firsts = torch.tensor([end - group + 1 for _, end in ends], dtype=torch.int64).to(k.device, non_blocking=True)
    if not ends:
        return
    places = firsts[:, None] + torch.arange(group, device=k.device)  # [E, group]
    slots = _slots(batch.block_tables[seqs], places, kept.shape[1])
    means = rows[slots].float().mean(dim=1).to(k.dtype)
    normed = F.rms_norm(means, weight.shape, weight, eps)
    rows.index_copy_(0, slots[:, -1], _rotated(normed, cos_sin[firsts]))


def select_keys(q: Tensor, cos_sin: Tensor, batch: Batch, kept: Tensor, selection: KeySelection) -> Tensor:
    """q [T, num_heads, D], kept [num_blocks, block_size, D] -> [T, most_keys] int32."""
    q = _rotated(q, cos_sin[batch.positions][:, None])
    found = torch.empty(len(q), selection.most_keys, dtype=torch.int32, device=q.device)
    for seqs, rows, end in _together(batch, selection):
        where = torch.tensor(rows).to(q.device, non_blocking=True)  # [B, n]
        tables = batch.block_tables[seqs].to(torch.int64)
        found[where] = _select(q[where], batch.positions[where], tables, end, kept, selection)
    return found


def _together(batch: Batch, selection: KeySelection) -> Iterator[tuple[list[int], list[list[int]], int]]:
    """Sequences, as many tokens of each, and how long the longest is: those with one token in the step together,
    others by themselves, some of their tokens at a time."""
    starts = [0, *accumulate(batch.query_lens)]
    singles = sorted((seq for seq, n in enumerate(batch.query_lens) if n == 1), key=lambda seq: batch.kv_lens[seq])
    while singles:
        end = batch.kv_lens[singles[-1]]
        most = max(1, MAX_SCORES // (selection.num_heads * (end // selection.group + 1)))
        singles, seqs = singles[:-most], singles[-most:]
        yield seqs, [[starts[seq]] for seq in seqs], end
    for seq, (num, end) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        most = max(1, MAX_SCORES // (selection.num_heads * (end // selection.group + 1)))
        for first in range(0, num if num > 1 else 0, most):
            last = min(first + most, num)
            yield [seq], [list(range(starts[seq] + first, starts[seq] + last))], end - num + last


def _select(q: Tensor, positions: Tensor, tables: Tensor, end: int, kept: Tensor, selection: KeySelection) -> Tensor:
    """Of B sequences of at most `end` tokens: q [B, n, num_heads, D], rotated, positions [B, n] -> [B, n, most_keys]
    int32."""
    group, device, block_size = selection.group, q.device, kept.shape[1]
    numbers = torch.arange(max(1, end // group), device=device)
    lasts = (numbers * group + group - 1).clamp(max=tables.shape[1] * block_size - 1)
    keys = kept.flatten(0, 1)[_slots(tables, lasts.expand(len(tables), -1), block_size)]  # [B, G, D]
    scores = torch.einsum("bnhd,bgd->bnhg", q.float(), keys.float()).clamp_(min=0).sum(dim=2)
    whole = ((positions + 1) // group)[..., None]  # [B, n, 1]
    scores = scores.masked_fill_(numbers >= whole, -torch.inf)
    num = min(selection.budget // group, len(numbers))
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num].sort(dim=-1).values  # [B, n, num]
    places = torch.arange(selection.most_keys, device=device)
    in_groups = whole.clamp(max=num) * group  # tokens of chosen groups
    of_group = chosen.gather(2, (places // group).clamp(max=num - 1).expand(*chosen.shape[:2], -1))
    found = torch.where(places < in_groups, of_group * group + places % group, whole * group + places - in_groups)
    seen = found <= positions[..., None]
    slots = _slots(tables, torch.where(seen, found, 0).flatten(1), block_size).view(found.shape)
    return torch.where(seen, slots, -1).to(torch.int32)


def _group_ends(batch: Batch, group: int) -> list[tuple[int, int]]:
    """Which of the step's tokens are the last of their group: sequence and position."""
    if batch.ancestors is not None:
        raise ValueError("keys cannot be chosen by tokens of a tree")
    spans = enumerate(zip(batch.query_lens, batch.kv_lens, strict=True))
    return [
        (seq, end)
        for seq, (num, stop) in spans
        for end in range((stop - num) // group * group + group - 1, stop, group)
    ]


def _slots(tables: Tensor, places: Tensor, block_size: int) -> Tensor:
    """Where tokens lie: tables [B, max_blocks], places in their sequence [B, N] int64 -> [B, N] int64."""
    return tables.long().gather(1, places // block_size) * block_size + places % block_size


def _rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [..., D] by cos_sin [..., rotary_dim], in float32; halves of the first rotary_dim channels pair up."""
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin.chunk(2, dim=-1)
    first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)
