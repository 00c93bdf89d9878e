"""Dual chunk attention (An et al. 2024) in plain torch, for any device; the twin of native kernels.

Of each query there are three, for keys of its own chunk, of the one before, and of all others. A run of queries of one
sequence meets its keys span by span, and partial softmaxes are merged as in FlashAttention (Dao et al. 2022): so what
it takes of memory is bounded, whatever the context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade_native import tiles

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade import Batch, DualChunks
    from blade_native.kv_cache import DenseKV
    from blade_native.tiles import Piece

MAX_ROWS = 512  # queries times heads of a run
MAX_KEYS = 8192  # of a span


def attend(
    queries: Seq[Tensor], batch: Batch, layer_kv: DenseKV, num_kv_heads: int, scale: float, chunks: DualChunks
) -> Tensor:
    """queries[d] [T, H, D], for keys d chunks behind, d from 0 to 2 and more -> [T, H * D], in float32 inside."""
    num_tokens, num_heads, head_dim = queries[0].shape
    dtype, shape = queries[0].dtype, (num_tokens, num_kv_heads, -1, head_dim)
    queries = [layer_kv.queries(q).float().view(shape) for q in queries]  # [T, KV, G, D]
    pieces = tiles.cut(batch.query_lens, batch.kv_lens, max(1, MAX_ROWS // num_heads))
    parts = [_attend_piece(piece, queries, batch, layer_kv, scale, chunks) for piece in pieces]
    return layer_kv.outputs(torch.cat(parts).flatten(1).to(dtype))


def _attend_piece(
    piece: Piece, queries: Seq[Tensor], batch: Batch, layer_kv: DenseKV, scale: float, chunks: DualChunks
) -> Tensor:
    """[n, H, D] float32."""
    rows = slice(piece.first_row, piece.first_row + piece.num_queries)
    picked = [q[rows].permute(1, 0, 2, 3).flatten(1, 2) * scale for q in queries]  # [KV, n * G, D]
    block_size, num_groups = layer_kv.block_size, queries[0].shape[2]
    table = batch.block_tables[piece.seq, : -(-piece.kv_end // block_size)].long()
    origin = layer_kv.origin(table[0])  # [KV, D]
    span = -(-MAX_KEYS // block_size)  # blocks
    most = picked[0].new_full((*picked[0].shape[:2], 1), -torch.inf)
    total, sums = torch.zeros_like(most), torch.zeros_like(picked[0])
    positions = _key_positions(piece, batch, len(table) * block_size)
    for first, blocks in enumerate(torch.split(table, span)):
        keys, values = layer_kv.gather(blocks, torch.float32).float().flatten(0, 1).permute(1, 2, 0, 3)  # [KV, L, D]
        if origin is not None:
            keys = keys + origin[:, None]
        start = first * span * block_size
        places = torch.arange(start, start + keys.shape[1], device=keys.device)
        at = positions[start : start + keys.shape[1]]
        behind = (batch.positions[rows][:, None] // chunks.length - at // chunks.length).clamp(max=2)  # [n, L]
        scores = _chosen([q @ keys.mT for q in picked], behind.repeat_interleave(num_groups, dim=0))
        hidden = _hidden(piece, batch, rows, places).repeat_interleave(num_groups, dim=0)
        scores = scores.masked_fill_(hidden, -torch.inf)
        new_most = torch.maximum(most, scores.amax(dim=-1, keepdim=True))  # all see their sequence's first key
        weights, kept = (scores - new_most).exp_(), (most - new_most).exp_()
        total = total * kept + weights.sum(dim=-1, keepdim=True)
        sums = sums * kept + weights @ values
        most = new_most
    shape = len(sums), piece.num_queries, num_groups, sums.shape[-1]
    return (sums / total).view(shape).transpose(0, 1).flatten(1, 2)


def _chosen(scores: Seq[Tensor], behind: Tensor) -> Tensor:
    """Of scores [KV, n * G, L] those with the queries for keys so far behind, [n * G, L]."""
    own, before, farther = scores
    return torch.where(behind == 0, own, torch.where(behind == 1, before, farther))


def _start(piece: Piece, batch: Batch) -> tuple[int, int]:
    """Of the piece's sequence: its first token in the step, and how many tokens there are before."""
    return sum(batch.query_lens[: piece.seq]), batch.kv_lens[piece.seq] - batch.query_lens[piece.seq]


def _key_positions(piece: Piece, batch: Batch, num_places: int) -> Tensor:
    """Of the sequence's keys, and of places beyond them, [num_places] int64."""
    row, before = _start(piece, batch)
    positions = torch.arange(num_places, device=batch.positions.device)
    end = min(batch.kv_lens[piece.seq], num_places)
    positions[before:end] = batch.positions[row : row + end - before]
    return positions


def _hidden(piece: Piece, batch: Batch, rows: slice, places: Tensor) -> Tensor:
    """Which keys, by their places in the sequence [L], the piece's queries do not see, [n, L] bool."""
    row, before = _start(piece, batch)
    own = torch.arange(rows.start, rows.stop, device=places.device) - row + before
    hidden = places > own[:, None]
    if batch.ancestors is None:
        return hidden
    seen = batch.ancestors[rows][:, None]
    in_step = (places - before).clamp(0, 63)
    off_path = (places >= before) & ~((seen >> in_step & 1).bool() & (places - before < 64))
    return torch.where(seen == 0, hidden, off_path)
