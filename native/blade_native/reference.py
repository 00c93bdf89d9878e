"""Every op in plain torch: what runs where there is no native kernel, and the twin of each where there is one."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from blade import Float8Weight, GroupedWeight
from blade.nn import DefaultOps, dequantize
from blade_native.host import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade import QuantizedWeight
    from blade.contracts import Linear


class TorchLinear:
    """y = x W^T + b, with W [N, K] as the checkpoint has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias).to(out_dtype or x.dtype)


class TorchQuantizedLinear:
    """y = x W^T + b over quantised weights, dequantised to x's dtype on every call."""

    def __init__(self, weights: Seq[QuantizedWeight], bias: Tensor | None) -> None:
        self.weights = weights
        self.bias = bias

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        weight = torch.cat([dequantize(weight, x.dtype) for weight in self.weights])
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype)).to(out_dtype or x.dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Of a single weight: ids [T] int64 -> [T, K]."""
        (weight,) = self.weights
        return dequantize(take_rows(weight, ids), dtype)


_TENSORS = ("q", "scales", "minima", "zeros", "block_scales", "block_minima")


def take_rows(weight: QuantizedWeight, ids: Tensor) -> QuantizedWeight:
    """The same weight of fewer rows, ids [R] int64."""
    if isinstance(weight, GroupedWeight):
        tensors = {name: value[ids] for name in _TENSORS if (value := getattr(weight, name)) is not None}
        return replace(weight, **tensors)
    return Float8Weight(
        weight.q.view(torch.uint8)[ids].view(weight.q.dtype),
        weight.scales[ids // weight.block[0]],
        (1, weight.block[1]),
    )


class TorchOps(DefaultOps):
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

    def quantized_linear(self, weights: Seq[QuantizedWeight], bias: Tensor | None) -> Linear:
        """The kernels' twin, too slow to serve with, so that quantized_dtypes stays empty."""
        return TorchQuantizedLinear(weights, bias)

    def embedding(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        table = self.to_device(weight)
        return lambda ids: F.embedding(ids, table)

    def embedding_of(self, linear: Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        if isinstance(linear, TorchQuantizedLinear):
            return partial(linear.rows, dtype=dtype) if len(linear.weights) == 1 else None
        if isinstance(linear, TorchLinear) and linear.weight.dtype is dtype:
            return self.embedding(linear.weight)
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Zhang & Sennrich 2019; torch computes it in float32 inside."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SwiGLU's gate (Shazeer 2020)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def delta_step(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor
    ) -> Tensor:
        """One decode step of the gated delta rule; see `delta_step`."""
        return delta_step(q, k, v, g, beta, state, slots)

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = logits.max(-1)
        return values, ids

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits [R, V] float32 -> argmax's ids, their values, and the log of the sum of exp of all logits, [R] each: a
        token's logprob is its logit less that, and min_p keeps what is at most -log(min_p) below the peak."""
        ids = without_nan(logits).argmax(-1)
        return ids, logits.gather(1, ids[:, None]).squeeze(1), logits.logsumexp(-1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [R, V] float32 -> values and ids [R, k], largest first, equal ones by id; NaN counts as -inf."""
    values, ids = torch.sort(without_nan(logits), dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def delta_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """The gated delta rule (Yang, Kautz & Hatamizadeh 2024) for one token of each of B sequences, as Qwen3-Next has it:
    q and k are brought to length 1, q is then scaled by DK^-0.5.

    q, k [B, HK, DK] and v [B, HV, DV] in the model's dtype, HK a divisor of HV; g (log of the decay) and beta [B, HV]
    float32; state [num_slots, HV, DK, DV] float32, changed in place at slots [B] int32. A slot below 0 is no sequence:
    its output is 0. Returns [B, HV, DV].
    """
    groups = v.shape[1] // k.shape[1]
    q, k = (unit(x.float()).repeat_interleave(groups, dim=1).unsqueeze(-1) for x in (q, k))  # [B, HV, DK, 1]
    held = state[slots.long().clamp(min=0)] * g.exp()[..., None, None]
    delta = (v.float() - (held * k).sum(-2)) * beta.unsqueeze(-1)
    held += k * delta.unsqueeze(-2)
    live = slots >= 0
    state[slots[live].long()] = held[live]
    out: Tensor = (held * q).sum(-2) * k.shape[-2] ** -0.5
    return (out * live[:, None, None]).to(v.dtype)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def without_nan(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits.isnan(), -math.inf)
