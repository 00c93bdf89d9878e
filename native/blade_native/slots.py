"""Attention over some keys of the cache alone in plain torch, for any device; the twin of native kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MAX_GATHER_BYTES = {"cpu": 16 << 20}  # KV that is gathered for some of the queries at a time
MAX_GATHER_BYTES_ELSEWHERE = 256 << 20


def attend_slots(q: Tensor, slots: Tensor, gather: Callable[[Tensor, torch.dtype], Tensor], scale: float) -> Tensor:
    """q [T, H, D], slots [T, N] int32, -1 behind the last that a query sees -> [T, H * D]. `gather` gives what is kept
    at slots [n] int64, [n, 2, KV, D] in the dtype of q."""
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(num_tokens, num_heads * head_dim)
    token_bytes = 2 * num_heads * head_dim * q.itemsize  # of fewer heads in truth
    max_bytes = MAX_GATHER_BYTES.get(q.device.type, MAX_GATHER_BYTES_ELSEWHERE)
    most = max(1, max_bytes // (token_bytes * slots.shape[1]))
    for first in range(0, num_tokens, most):
        own = slots[first : first + most].long()
        hidden = own < 0
        held = gather(torch.where(hidden, own[:, :1], own).flatten(), q.dtype)  # nobody else's: 0 times NaN is NaN
        keys, values = held.view(*own.shape, *held.shape[1:]).permute(2, 0, 3, 1, 4)  # [n, KV, N, D]
        queries = q[first : first + most].view(len(own), keys.shape[1], -1, head_dim)  # [n, KV, G, D]
        bias = torch.zeros(own.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
        mixed = F.scaled_dot_product_attention(queries, keys, values, bias[:, None, None], scale=scale)
        out[first : first + most] = mixed.flatten(1)
    return out
