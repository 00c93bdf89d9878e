"""Every op in plain torch: what runs where there is no native kernel, and the twin of each where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from blade_native.host import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from blade import Batch
    from blade.contracts import Linear


class TorchLinear:
    """y = x W^T + b, with W [N, K] as the checkpoint has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias).to(out_dtype or x.dtype)


class TorchOps:
    """contracts.Ops on any torch device. Subclasses replace what their device does faster."""

    name = "torch"

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

    def embedding(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        table = self.to_device(weight)
        return lambda ids: F.embedding(ids, table)

    def embedding_of(self, linear: Linear) -> Callable[[Tensor], Tensor] | None:
        return self.embedding(linear.weight) if isinstance(linear, TorchLinear) else None

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def capture(self, forward: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        return forward

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

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = logits.max(-1)
        return values, ids
