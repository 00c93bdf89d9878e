"""Attention over whole sequences: nothing is kept for a later step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch, KVCache, KVSpec


class WholeAttention:
    """contracts.Attention for batches whose sequences all start at their first token."""

    chunked = True

    def block_bytes(self, spec: KVSpec) -> int:
        return 0

    def allocate(self, spec: KVSpec, num_blocks: int) -> KVCache:
        return [None] * spec.num_layers

    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: Any
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        layer_kv: Any,
        scale: float,
        window: int | None,
        chunk: int | None = None,
    ) -> Tensor:
        lens = batch.query_lens  # a chunk of positions is as a sequence
        if chunk is not None:
            lens = [min(chunk, length - start) for length in lens for start in range(0, length, chunk)]
        queries, keys, values = (each.split_with_sizes(lens) for each in (q, k, v))
        sequences = zip(queries, keys, values, strict=True)
        return torch.cat([attend_one(*sequence, scale, window) for sequence in sequences])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x [T, H, D], halves paired; channels beyond the pairs stay."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [L, H, D], k and v [L, KV, D] -> [L, H * D]."""
    length, num_heads, _ = q.shape
    k, v = (each.repeat_interleave(num_heads // each.shape[1], dim=1) for each in (k, v))
    mask = None
    if window is not None and window < length:
        behind = torch.arange(length, device=q.device)
        behind = behind[:, None] - behind
        mask = (behind >= 0) & (behind < window)
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))  # [1, H, L, D]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return mixed[0].transpose(0, 1).reshape(length, -1)
