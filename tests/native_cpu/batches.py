"""Ragged batches over a paged cache, and the attention they should get."""

from __future__ import annotations

import torch
from torch import Tensor

from blade import Batch, KVSpec


def ragged(query_lens: list[int], kv_lens: list[int], block_size: int) -> Batch:
    """Sequence b owes query_lens[b] tokens of kv_lens[b]; blocks are scattered and the tables padded."""
    blocks = [-(-kv // block_size) for kv in kv_lens]
    order = torch.randperm(sum(blocks), dtype=torch.int32) + 1  # block 0 is nobody's
    tables = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
    for row, mine in zip(tables, order.split(blocks), strict=True):
        row[: len(mine)] = mine
    spans = list(zip(query_lens, kv_lens, tables, strict=True))
    positions = [torch.arange(kv - owed, kv) for owed, kv, _ in spans]
    slots = [
        table[at // block_size].long() * block_size + at % block_size
        for at, (_, _, table) in zip(positions, spans, strict=True)
    ]
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return Batch(
        input_ids=torch.zeros(sum(query_lens), dtype=torch.int64),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        cu_seqlens=starts,
        context_lens=torch.tensor(kv_lens, dtype=torch.int32),
        block_tables=tables,
        logits_rows=starts[1:].long() - 1,
        query_lens=query_lens,
        kv_lens=kv_lens,
    )


def rotated(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rope as contracts.Attention says it, x [T, H, D], in float32."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    half, rotary = cos.shape[-1], 2 * cos.shape[-1]
    a, b, rest = x.float().split((half, half, x.shape[-1] - rotary), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_owed: int,
    scale: float,
    window: int | None,
    chunk: int | None = None,
    tree: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Dense causal attention of the last num_owed of L tokens: q [owed, H, D], k and v [L, KV, D], in float64.
    `tree`: of owed tokens that are one, the positions [L] of all, and which of the owed each of them sees, bool
    [owed, owed]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    keys = torch.arange(len(k)) if tree is None else tree[0]
    queries = keys[len(k) - num_owed :, None]
    hidden = keys > queries
    if tree is not None:
        hidden[:, len(k) - num_owed :] = ~tree[1]
    hidden |= queries - keys >= (window or len(k))
    if chunk:
        hidden |= queries // chunk != keys // chunk
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def spec(num_heads: int, num_kv_heads: int, head_dim: int, kind: str, block_size: int = 16) -> KVSpec:
    """`kind` is a dtype, or "dtype/storage"."""
    dtype, _, storage = kind.partition("/")
    return KVSpec(2, num_heads, num_kv_heads, head_dim, dtype, block_size, storage or None)
