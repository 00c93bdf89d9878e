"""What recurrent layers ask of a device, in plain torch: see contracts.Ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from blade.types import Batch


def short_conv(x: Tensor, weight: Tensor, batch: Batch, state: Tensor) -> Tensor:
    """x [T, C], weight [C, W], state [num_slots, C, W - 1] -> [T, C]."""
    window = weight.shape[1]
    held = _read(state, batch)  # [B, C, W - 1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    start = 0
    for sequence, length in enumerate(batch.query_lens):
        inputs = torch.cat((held[sequence], x[start : start + length].T), dim=1)  # [C, W - 1 + L]
        mixed = F.conv1d(inputs.float()[None], weight.float()[:, None], groups=len(weight))[0]
        out[start : start + length] = F.silu(mixed).T.to(x.dtype)
        held[sequence] = inputs[:, 1 - window :]
        start += length
    _write(state, batch, held)
    return out


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, dt_bias: Tensor, batch: Batch, state: Tensor
) -> Tensor:
    """q, k [T, HK, DK], v [T, HV, DV], a, b [T, HV], state [num_slots, HV, DK, DV] float32 -> [T, HV, DV]. Token by
    token, for all sequences at once that have that many."""
    groups = v.shape[1] // k.shape[1]
    q, k = (_unit(x.float()).repeat_interleave(groups, dim=1).unsqueeze(-1) for x in (q, k))  # [T, HV, DK, 1]
    q = q * k.shape[2] ** -0.5
    values = v.float().unsqueeze(2)  # [T, HV, 1, DV]
    alpha = (decay * F.softplus(a.float() + dt_bias)).exp()[..., None, None]
    beta = b.float().sigmoid()[..., None, None]
    held = _read(state, batch)  # [B, HV, DK, DV]
    out = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    starts = batch.cu_seqlens[:-1].long()
    lengths = batch.cu_seqlens.diff()
    for step in range(batch.max_query_len):
        live = (lengths > step).nonzero().squeeze(1)
        rows = starts[live] + step
        now = held[live] * alpha[rows]
        now += k[rows] * (beta[rows] * (values[rows] - (now * k[rows]).sum(2, keepdim=True)))
        out[rows] = (now * q[rows]).sum(2)
        held[live] = now
    _write(state, batch, held)
    return out.to(v.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x and gate [T, H, D], weight [D] -> [T, H, D]."""
    normed = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return (normed * F.silu(gate.float())).to(x.dtype)


def _read(state: Tensor, batch: Batch) -> Tensor:
    """A copy of each sequence's state, [B, ...]; zeros where there is none yet."""
    slots = _slots(batch.state_in)
    held = state[slots.clamp(min=0)]
    return held.masked_fill_((slots < 0).view(-1, *[1] * (held.dim() - 1)), 0)


def _write(state: Tensor, batch: Batch, held: Tensor) -> None:
    slots = _slots(batch.state_out)
    state[slots[slots >= 0]] = held[slots >= 0]


def _slots(slots: Tensor | None) -> Tensor:
    if slots is None:
        raise ValueError("the batch says nothing of the slots of states")
    return slots.long()


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
