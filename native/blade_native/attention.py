"""Paged attention (Kwon et al. 2023) in plain torch, for any device; the twin of native kernels.

A layer's cache (kv_cache.py) keeps one token's KV together, so a step gathers and stores whole rows; what is rounded
is gathered in the model's dtype. Per tile the blocks are gathered and handed to torch's flash attention, in which
the query heads of one KV head are further queries (grouped-query attention, Ainslie et al. 2023): on a CPU 9 times
faster in a bfloat16 decode of Qwen2.5-0.5B, 16 sequences of 256 tokens, than head by head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from blade_native import dual_chunks, tiles
from blade_native.kv_cache import Firsts, make
from blade_native.kv_codes import MODES, block_bytes
from blade_native.slots import attend_slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from blade import Batch, DualChunks, KVCache, KVSpec
    from blade_native.kv_cache import DenseKV

MAX_ROWS = 512  # queries times grouped heads of a tile: enough to fill the cores, few enough for the caches
MAX_GATHER_BYTES = {"cpu": 4 << 20}  # KV of a tile of several sequences: about what the caches hold
MAX_GATHER_BYTES_ELSEWHERE = 256 << 20


class PagedAttention:
    """contracts.Attention on one device."""

    kv_storages = tuple(MODES)
    chunked = trees = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._plan: Plan | None = None  # of the batch that was last seen: all layers of a step share it

    def block_bytes(self, spec: KVSpec) -> int:
        return spec.num_layers * sum(block_bytes(spec))

    def allocate(self, spec: KVSpec, num_blocks: int) -> KVCache:
        return [make(spec, num_blocks, self.device) for _ in range(spec.num_layers)]

    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: DenseKV
    ) -> tuple[Tensor, Tensor]:
        """See contracts.Attention."""
        rotated = rotate(torch.cat((q, k), dim=1), *self._plan_for(batch).rotation(cos_sin))  # [T, H + KV, D]
        q, k = torch.split_with_sizes(rotated, (q.shape[1], k.shape[1]), dim=1)
        self._store(k, v, batch, layer_kv)
        return q, k

    def _store(self, k: Tensor, v: Tensor, batch: Batch, layer_kv: DenseKV) -> None:
        plan = self._plan_for(batch)
        plan.clear_new_blocks(layer_kv)
        layer_kv.store(batch.slots, k, v, plan.firsts)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        layer_kv: DenseKV,
        scale: float,
        window: int | None,
        chunk: int | None = None,
    ) -> Tensor:
        """See contracts.Attention."""
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        out = q.new_empty(num_tokens, num_heads * head_dim)
        q, reach = layer_kv.queries(q), tiles.Reach(window, chunk)
        for tile in self._plan_for(batch).tiles(layer_kv, num_heads // num_kv_heads, reach, q.dtype):
            b, n = tile.num_pieces, len(tile.rows) // tile.num_pieces
            gathered = layer_kv.gather(tile.blocks, q.dtype).view(b, -1, 2, num_kv_heads, head_dim)
            keys, values = gathered.permute(2, 0, 3, 1, 4)  # [B, KV, L, D]
            queries = q.index_select(0, tile.rows).view(b, n, num_kv_heads, -1, head_dim)
            queries = queries.transpose(1, 2).flatten(2, 3)  # [B, KV, n * G, D]
            mixed = F.scaled_dot_product_attention(queries, keys, values, tile.bias, scale=scale)
            mixed = mixed.view(b, num_kv_heads, n, -1, head_dim).transpose(1, 2)  # [B, n, KV, G, D]
            out.index_copy_(0, tile.rows, mixed.reshape(b * n, -1))
        return layer_kv.outputs(out)

    def attend_dual_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        batch: Batch,
        layer_kv: DenseKV,
        scale: float,
        chunks: DualChunks,
    ) -> Tensor:
        """See contracts.DualChunkAttention."""
        rotations = [self._plan_for(batch).rotation(cos_sin, chunks, behind) for behind in range(3)]
        self._store(rotate(k, *rotations[0]), v, batch, layer_kv)
        queries = [rotate(q, *rotation) for rotation in rotations]
        return dual_chunks.attend(queries, batch, layer_kv, k.shape[1], scale, chunks)

    def attend_slots(self, q: Tensor, batch: Batch, layer_kv: DenseKV, scale: float, slots: Tensor) -> Tensor:
        """See contracts.SlotAttention."""
        return layer_kv.outputs(attend_slots(layer_kv.queries(q), slots, layer_kv.gather_tokens, scale))

    def _plan_for(self, batch: Batch) -> Plan:
        if self._plan is None or self._plan.batch is not batch:
            self._plan = Plan(batch)
        return self._plan


class Plan:
    """What the layers of one step have in common, made by the first that asks."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._rotations: dict[tuple[int, DualChunks | None, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._new_blocks: Tensor | None = None
        self._firsts: Firsts | None = None
        self._tiles: dict[tiles.Reach, list[tiles.Tile]] = {}

    def rotation(self, cos_sin: Tensor, chunks: DualChunks | None = None, behind: int = 0) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (-sin, sin) at the batch's positions, [T, 1, rotary_dim] float32; with chunks of those from
        which keys so far behind are met."""
        key = id(cos_sin), chunks, behind
        if key not in self._rotations:
            positions = self.batch.positions
            if chunks is not None:
                positions = (positions % chunks.length + behind * chunks.length).clamp(max=chunks.farthest)
            cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
            rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            self._rotations[key] = (cos_sin, *rotation)  # the table is held, so its id stays its own
        return self._rotations[key][1:]

    def clear_new_blocks(self, layer_kv: DenseKV) -> None:
        """Zero the blocks that get their first token. What another sequence left in the slots behind is never seen, but
        its weight 0 times an infinity or NaN would be."""
        if self._new_blocks is None:
            rows = self._rows_where(lambda position: position % layer_kv.block_size == 0)
            self._new_blocks = self.batch.slots[rows] // layer_kv.block_size
        if len(self._new_blocks):
            layer_kv.clear(self._new_blocks)

    def firsts(self) -> Firsts:
        if self._firsts is None:
            lens = torch.tensor(self.batch.query_lens).to(self.batch.slots.device, non_blocking=True)
            blocks = self.batch.block_tables[:, 0].long().repeat_interleave(lens, output_size=len(self.batch.slots))
            self._firsts = Firsts(blocks, self._rows_where(lambda position: position == 0))
        return self._firsts

    def _rows_where(self, chosen: Callable[[int], bool]) -> Tensor:
        """Of the step's tokens, those at the chosen positions."""
        spans = zip(self.batch.query_lens, self.batch.kv_lens, strict=True)
        positions = [i for length, end in spans for i in range(end - length, end)]
        rows = [row for row, position in enumerate(positions) if chosen(position)]
        return torch.tensor(rows, dtype=torch.int64).to(self.batch.slots.device, non_blocking=True)

    def tiles(self, layer_kv: DenseKV, num_groups: int, reach: tiles.Reach, dtype: torch.dtype) -> list[tiles.Tile]:
        if reach not in self._tiles:
            batch, block_size = self.batch, layer_kv.block_size
            max_bytes = MAX_GATHER_BYTES.get(batch.slots.device.type, MAX_GATHER_BYTES_ELSEWHERE)
            max_keys = max_bytes // layer_kv.token_bytes
            max_queries = max(1, MAX_ROWS // num_groups // block_size) * block_size
            groups = tiles.group(tiles.cut(batch.query_lens, batch.kv_lens, max_queries), max_keys)
            biases: dict[tuple[int, int], Tensor] = {}
            self._tiles[reach] = [
                tiles.build(pieces, batch, block_size, num_groups, reach, dtype, biases) for pieces in groups
            ]
        return self._tiles[reach]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves paired as in GPT-NeoX, in float32 inside.

    x [T, N, D]; cos is (cos, cos) and sin (-sin, sin), [T, 1, rotary_dim]; channels beyond rotary_dim stay.
    """
    rotary_dim = cos.shape[-1]
    turning = x[..., :rotary_dim].float()
    first, second = turning.chunk(2, dim=-1)
    turned = torch.cat((second, first), dim=-1).mul_(sin).addcmul_(turning, cos).to(x.dtype)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)
