"""What the layers of one step have in common: which kernel serves which sequence, and how many blocks of threads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blade import Batch
from blade_native.cuda.attention_kernels import CHUNK, DECODE_ROWS, MAX_CHUNKS, PREFILL_WARPS, SPLIT_ROWS
from blade_native.cuda.torch_ops import to_cuda
from blade_native.simd.check import check

BLOCKS_PER_SM = 8  # of threads: what a grid aims at, some three times what runs at once
PREFILL_ROWS = PREFILL_WARPS * 16


@dataclass(slots=True, frozen=True)
class Split:
    """How the keys of short sequences are cut under one window."""

    max_chunks: int  # of any sequence
    grid: int  # blocks of threads that share a sequence's chunks


class Plan:
    """Of one batch and one ratio of heads. Made from the lengths the host knows; the kernels read the device's."""

    def __init__(self, batch: Batch, group: int, num_kv_heads: int, num_sms: int) -> None:
        self.batch, self.group = batch, group
        self.num_tokens, self.num_seqs = len(batch.positions), len(batch.context_lens)
        self.table_stride = batch.block_tables.shape[-1]
        check("positions", batch.positions, torch.int64, (self.num_tokens,))
        check("slots", batch.slots, torch.int64, (self.num_tokens,))
        check("cu_seqlens", batch.cu_seqlens, torch.int32, (self.num_seqs + 1,))
        check("context_lens", batch.context_lens, torch.int32, (self.num_seqs,))
        check("block_tables", batch.block_tables, torch.int32, (self.num_seqs, self.table_stride))
        if batch.ancestors is not None:
            check("ancestors", batch.ancestors, torch.int64, (self.num_tokens,))
        self._blocks_wanted = BLOCKS_PER_SM * num_sms
        self._num_kv_heads = num_kv_heads
        self._splits: dict[int, Split] = {}

        rows = [length * group for length in batch.query_lens]
        self.max_rows = max(rows)
        # Several tokens of a sequence from its first on: a lone first one needs no other launch's results.
        self.any_beginning = any(n == kv > 1 for n, kv in zip(batch.query_lens, batch.kv_lens, strict=True))
        self.any_split_item = any(DECODE_ROWS < n <= SPLIT_ROWS for n in rows)
        self.any_short = any(0 < n <= DECODE_ROWS for n in rows)
        self._split = [n <= SPLIT_ROWS for n in rows]
        self.num_split_tokens = sum(n for n, split in zip(batch.query_lens, self._split, strict=True) if split)
        self.num_items = sum(-(-n // PREFILL_ROWS) for n in rows if n > DECODE_ROWS)
        self.items, self.partial_starts = self._to_device(rows)

    def _to_device(self, rows: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """(items [num_items, 2], partial_starts [B]) of AttentionArgs, in one copy. Decodes need neither, so that a
        step of them can be captured."""
        items = [(tile, seq) for seq, n in enumerate(rows) if n > DECODE_ROWS for tile in range(-(-n // PREFILL_ROWS))]
        if len(items) == len(rows) == len({seq for _, seq in items}):
            items = []
        numbers = [number for tile, seq in sorted(items, reverse=True) for number in (seq, tile)]
        if not all(self._split):
            start = 0
            for length, split in zip(self.batch.query_lens, self._split, strict=True):
                numbers.append(start)
                start += length if split else 0
        if not numbers:
            return None, None
        on_device = to_cuda(torch.tensor(numbers, dtype=torch.int32), self.batch.positions.device)
        of_items, starts = on_device[: 2 * len(items)], on_device[2 * len(items) :]
        return (of_items if len(of_items) else None), (starts if len(starts) else None)

    def split(self, window: int) -> Split:
        """`window`: keys that a query sees at most, or 0. Chunks are counted for the least favourable place of a window
        among the tiles of 16 keys, so that they suffice wherever a replayed step has it."""
        if window not in self._splits:
            lens = zip(self.batch.query_lens, self.batch.kv_lens, self._split, strict=True)
            spans = [min(kv, window + query + 14) if window else kv for query, kv, split in lens if split]
            max_chunks = min(MAX_CHUNKS, -(-max(spans, default=1) // CHUNK)) or 1
            grid = min(max_chunks, -(-self._blocks_wanted // (self.num_seqs * self._num_kv_heads)))
            self._splits[window] = Split(max_chunks, grid)
        return self._splits[window]
