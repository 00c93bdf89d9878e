"""Symmetric integers: w = scale * (q - half), a float16 scale for each group of a row (Dettmers et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from blade import GroupedWeight
from blade.nn import in_chunks

CHUNK = 1 << 17  # numbers that go through all operations together: they stay in cache


def quantize_symmetric(weight: Tensor, bits: int, group: int) -> GroupedWeight:
    """weight [N, K] of any float dtype, K a multiple of `group`, on any device, to up to 8 bits; half is 2^(bits - 1).
    The largest number of a group decides its scale."""
    (n, k), device, half = weight.shape, weight.device, 1 << (bits - 1)
    q = torch.empty(n, k // group, group, dtype=torch.uint8, device=device)
    scales = torch.empty(n, k // group, 1, dtype=torch.float16, device=device)

    def work(x: Tensor, q: Tensor, scales: Tensor) -> None:
        """x [R, G, group] into q of the same shape and scales [R, G, 1]."""
        x = x.float()
        scales.copy_(x.abs().amax(dim=2, keepdim=True) / (half - 1))
        unit = scales.float()
        q.copy_((x * torch.where(unit > 0, 1 / unit, 0)).round_().clamp_(-half, half - 1).add_(half))

    in_chunks(work, max(1, CHUNK // k), weight.view(q.shape), q, scales)
    return GroupedWeight(bits, group, q.view(n, k), scales.squeeze(2))
