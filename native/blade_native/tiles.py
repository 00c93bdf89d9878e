"""How a ragged step is cut into tiles, each of which is one dense attention over keys gathered side by side.

A tile is a few sequences with equally many queries and about as many keys, or a run of queries of one long prompt.
Decodes, chunks of prompts and verifications of drafts are all tiles; nothing below tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade import Batch

MAX_SHARED_QUERIES = 8  # sequences with more queries in the step fill a tile of their own
MAX_STRETCH, MAX_PADDING = 1.25, 64  # a tile's keys are padded to its longest: at most so much beyond its shortest


class Reach(NamedTuple):
    """Which of the keys before it a query sees: the last `window`, or those of its own `chunk` of positions; or all."""

    window: int | None = None
    chunk: int | None = None

    def first(self, position: int) -> int:
        """The first key that the query at a position sees."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def hides(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool, of positions that broadcast."""
        hidden = keys > queries
        if self.chunk is not None:
            return hidden | (keys // self.chunk != queries // self.chunk)
        return hidden if self.window is None else hidden | (queries - keys >= self.window)


class Piece(NamedTuple):
    """Consecutive queries of one sequence."""

    seq: int  # in the batch
    first_row: int  # in the batch's T tokens
    num_queries: int
    kv_end: int  # keys seen by the last of them


@dataclass(slots=True, frozen=True)
class Tile:
    """B pieces of n queries over L keys each, on the device. L is a whole number of blocks."""

    num_pieces: int
    rows: Tensor  # [B * n] int64: which of the batch's T tokens the queries are
    blocks: Tensor  # [B * L / block_size]: which KV blocks hold the keys
    bias: Tensor  # [B, 1, n * G, L]: 0 where a query sees a key, else -inf; the G heads of a KV head innermost


def cut(query_lens: Iterable[int], kv_lens: Iterable[int], max_queries: int) -> Iterator[Piece]:
    """Cut at multiples of max_queries tokens of the sequence, so that tiles of prompts end alike and share a bias."""
    row = 0
    for seq, (num_queries, end) in enumerate(zip(query_lens, kv_lens, strict=True)):
        start = end - num_queries
        while start < end:
            stop = min(end, (start // max_queries + 1) * max_queries)
            yield Piece(seq, row, stop - start, stop)
            row += stop - start
            start = stop


def group(pieces: Iterable[Piece], max_keys: int) -> list[list[Piece]]:
    """Pieces that become one tile, by falling number of queries and keys; max_keys bounds the keys they gather."""
    tiles: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (piece.num_queries, piece.kv_end), reverse=True):
        if tiles and _fits(tiles[-1], piece, max_keys):
            tiles[-1].append(piece)
        else:
            tiles.append([piece])
    return tiles


def _fits(tile: list[Piece], piece: Piece, max_keys: int) -> bool:
    longest = tile[0]
    return (
        piece.num_queries == longest.num_queries <= MAX_SHARED_QUERIES
        and longest.kv_end <= piece.kv_end * MAX_STRETCH + MAX_PADDING
        and longest.kv_end * (len(tile) + 1) <= max_keys
    )


def build(
    pieces: Seq[Piece],
    batch: Batch,
    block_size: int,
    num_groups: int,
    reach: Reach,
    dtype: torch.dtype,
    biases: dict[tuple[int, int], Tensor],
) -> Tile:
    """The tile of these pieces. `biases` is shared by the tiles of a step, which come longest first: seen from its end
    the bias of a lone piece is always the same triangle, so shorter tiles use the tail of a longer one's. Not so with
    chunks."""
    device = batch.positions.device
    num_queries = pieces[0].num_queries
    firsts = [reach.first(_lowest(p, batch)) // block_size for p in pieces]
    num_blocks = max(-(-p.kv_end // block_size) - first for p, first in zip(pieces, firsts, strict=True))
    numbers = torch.tensor([(*piece, first) for piece, first in zip(pieces, firsts, strict=True)])
    columns = numbers.to(device, non_blocking=True).unsqueeze(-1).unbind(1)
    seqs, rows, _, ends, first_blocks = columns  # [B, 1] each

    places = first_blocks + torch.arange(num_blocks, device=device)  # [B, num_blocks] in the block table
    # Beyond its end a sequence reads its own last block again: hidden, and nobody else's.
    blocks = batch.block_tables[seqs.squeeze(1)].gather(1, torch.minimum(places, (ends - 1) // block_size))
    queries = torch.arange(num_queries, device=device)
    shape = (num_queries, -pieces[0].kv_end % block_size)
    alike = len(pieces) == 1 and reach.chunk is None and batch.ancestors is None
    bias = biases.get(shape) if alike else None
    if bias is None:
        keys = (places[:, :, None] * block_size + torch.arange(block_size, device=device)).flatten(1)
        hidden = reach.hides((ends - num_queries + queries)[:, :, None], keys[:, None, :])  # [B, n, L]
        if batch.ancestors is not None:
            hidden = _in_trees(hidden, batch, batch.ancestors, reach, (seqs, rows + queries), keys)
        bias = _bias(hidden, num_groups, dtype)
        if alike:
            biases[shape] = bias
    return Tile(
        num_pieces=len(pieces),
        rows=(rows + queries).flatten(),
        blocks=blocks.flatten(),
        bias=bias[..., bias.shape[-1] - num_blocks * block_size :],
    )


def _lowest(piece: Piece, batch: Batch) -> int:
    """No query of the piece is at a lower position; in a tree all may be at that of the second token of the step."""
    first = piece.kv_end - piece.num_queries
    return first if batch.ancestors is None else min(first, batch.kv_lens[piece.seq] - batch.query_lens[piece.seq])


def _in_trees(
    hidden: Tensor, batch: Batch, ancestors: Tensor, reach: Reach, of: tuple[Tensor, Tensor], keys: Tensor
) -> Tensor:
    """`hidden` [B, n, L] as it is with trees of drafts in the step (Batch.ancestors). keys [B, L] are places in their
    sequence."""
    seqs, rows = of  # [B, 1], and [B, n] of the batch's tokens
    starts = batch.cu_seqlens[seqs]  # [B, 1]
    places = keys - batch.context_lens[seqs] + batch.cu_seqlens[seqs + 1] - starts  # [B, L] in the step
    before = places < 0
    in_step = (starts + places).clamp(0, len(ancestors) - 1)
    positions = torch.where(before, keys, batch.positions[in_step])
    own = ancestors[rows][:, :, None]  # [B, n, 1]
    is_ancestor = (own >> places.clamp(0, 63)[:, None] & 1).bool() & (places < 64)[:, None]  # [B, n, L]
    beyond = reach.hides(batch.positions[rows][:, :, None], positions[:, None])
    return torch.where(own == 0, hidden, beyond | ~(is_ancestor | before[:, None]))


def _bias(hidden: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """hidden [B, n, L]."""
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return bias[:, None].repeat_interleave(num_groups, dim=2)
