"""Quantised weights as plain numbers: what a `blade.GroupedWeight` and a `blade.Float8Weight` stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.types import Float8Weight

if TYPE_CHECKING:
    from torch import Tensor

    from blade.types import GroupedWeight, QuantizedWeight


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """[N, K], computed in float32 and rounded once; columns in the order of x's features."""
    if isinstance(weight, Float8Weight):
        return (weight.q.float() * expand_scales(weight, 1)).to(dtype)
    n, k = weight.q.shape
    w = _integers(weight).view(n, -1, weight.group)
    w *= _per_group(weight.scales, weight.block_scales)
    if weight.minima is not None:
        w += _per_group(weight.minima, weight.block_minima)
    w = w.view(n, k).to(dtype)
    return w if weight.order is None else torch.empty_like(w).index_copy_(1, weight.order.to(w.device), w)


def _integers(weight: GroupedWeight) -> Tensor:
    """[N, K] float32: what the scales multiply."""
    if weight.values is not None:
        return torch.tensor(weight.values, dtype=torch.float32, device=weight.q.device)[weight.q.long()]
    n, k = weight.q.shape
    zero = 0.0 if weight.minima is not None else 2.0 ** (weight.bits - 1)
    w = weight.q.view(n, -1, weight.group).float()
    w -= zero if weight.zeros is None else weight.zeros.unsqueeze(2).float()
    return w.view(n, k)


def _per_group(values: Tensor, blocks: Tensor | None) -> Tensor:
    """A scale or minimum for each group: [N, K / group, 1] float32. Codes count multiples of their block's."""
    if blocks is None:
        return values.float().unsqueeze(2)
    n, num_blocks = blocks.shape
    return (values.float().view(n, num_blocks, -1) * blocks.float().unsqueeze(2)).view(n, -1, 1)


def expand_scales(weight: Float8Weight, group: int) -> Tensor:
    """A scale for each `group` columns of a row, [N, ceil(K / group)] float32: that of the first of them."""
    (n, k), (rows, columns) = weight.q.shape, weight.block
    wanted = (-(-n // rows), -(-k // columns))
    if weight.scales.shape != wanted:
        raise ValueError(f"scales have shape {tuple(weight.scales.shape)}, not {wanted}")
    scales = weight.scales.float()
    return scales[torch.arange(n, device=scales.device) // rows][
        :, torch.arange(0, k, group, device=scales.device) // columns
    ]
