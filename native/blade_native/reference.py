"""Every op in plain torch: what runs where there is no native kernel, and the twin of each where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from blade_native.host import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade import GroupedWeight
    from blade.contracts import Linear


class TorchLinear:
    """y = x W^T + b, with W [N, K] as the checkpoint has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias).to(out_dtype or x.dtype)


class TorchGroupedLinear:
    """y = x W^T + b over grouped weights, dequantised to x's dtype on every call."""

    def __init__(self, weights: Seq[GroupedWeight], bias: Tensor | None) -> None:
        self.weights = weights
        self.bias = bias

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        weight = torch.cat([dequantize(weight, x.dtype) for weight in self.weights])
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype)).to(out_dtype or x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Of a single weight: ids [T] int64 -> [T, K] float32."""
        (weight,) = self.weights
        tensors = {name: value[ids] for name in _TENSORS if (value := getattr(weight, name)) is not None}
        return dequantize(replace(weight, **tensors), torch.float32)


_TENSORS = ("q", "scales", "minima", "zeros", "block_scales", "block_minima")


def dequantize(weight: GroupedWeight, dtype: torch.dtype) -> Tensor:
    """[N, K], computed in float32 and rounded once."""
    n, k = weight.q.shape
    zero = 0.0 if weight.minima is not None else 2.0 ** (weight.bits - 1)
    w = weight.q.view(n, -1, weight.group).float()
    w -= zero if weight.zeros is None else weight.zeros.unsqueeze(2).float()
    w *= _per_group(weight.scales, weight.block_scales)
    if weight.minima is not None:
        w += _per_group(weight.minima, weight.block_minima)
    return w.view(n, k).to(dtype)


def _per_group(values: Tensor, blocks: Tensor | None) -> Tensor:
    """A scale or minimum for each group: [N, K / group, 1] float32. Codes count multiples of their block's."""
    if blocks is None:
        return values.float().unsqueeze(2)
    n, num_blocks = blocks.shape
    return (values.float().view(n, num_blocks, -1) * blocks.float().unsqueeze(2)).view(n, -1, 1)


class TorchOps:
    """contracts.Ops on any torch device. Subclasses replace what their device does faster."""

    name = "torch"
    grouped_dtypes: Collection[torch.dtype] = ()  # grouped_linear is the kernels' twin, too slow to serve with

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def default_dtype(self) -> torch.dtype:
        return torch.float32

    def available_memory(self) -> int:
        return available_memory()

    def to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TorchLinear(self.to_device(weight), None if bias is None else self.to_device(bias))

    def grouped_linear(self, weights: Seq[GroupedWeight], bias: Tensor | None) -> Linear:
        return TorchGroupedLinear(weights, bias)

    def embedding(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        table = self.to_device(weight)
        return lambda ids: F.embedding(ids, table)

    def embedding_of(self, linear: Linear) -> Callable[[Tensor], Tensor] | None:
        if isinstance(linear, TorchGroupedLinear):
            return linear.rows if len(linear.weights) == 1 else None
        return self.embedding(linear.weight) if isinstance(linear, TorchLinear) else None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Zhang & Sennrich 2019; torch computes it in float32 inside."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual.add_(x)
        return self.rms_norm(residual, weight, eps), residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SwiGLU's gate (Shazeer 2020)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
