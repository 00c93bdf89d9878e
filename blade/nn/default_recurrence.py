"""What recurrent layers ask of a device, in plain torch: see contracts.Ops."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from blade.types import Batch

SHORT = 4  # tokens of a step; sequences that have no more go on token by token, all together
CHUNK = 64  # tokens of a longer one at a time


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
    """q, k [T, HK, DK], v [T, HV, DV], a, b [T, HV], state [num_slots, HV, DK, DV] float32 -> [T, HV, DV]."""
    groups = v.shape[1] // k.shape[1]
    q, k = (_unit(x.float()).repeat_interleave(groups, dim=1) for x in (q, k))  # [T, HV, DK]
    tokens = Tokens(q * k.shape[2] ** -0.5, k, v.float(), decay * F.softplus(a.float() + dt_bias), b.float().sigmoid())
    held = _read(state, batch)  # [B, HV, DK, DV]
    out = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    starts = [0, *accumulate(batch.query_lens)]
    short = [i for i, length in enumerate(batch.query_lens) if length <= SHORT]
    for step in range(max((batch.query_lens[i] for i in short), default=0)):  # all of them together
        live = [i for i in short if batch.query_lens[i] > step]
        where = torch.tensor(live).to(v.device, non_blocking=True)
        rows = torch.tensor([starts[i] + step for i in live]).to(v.device, non_blocking=True)
        out[rows], held[where] = _token(tokens.take(rows), held[where])
    for i, length in enumerate(batch.query_lens):
        if length > SHORT:
            for start in range(starts[i], starts[i + 1], CHUNK):
                span = slice(start, min(start + CHUNK, starts[i + 1]))
                out[span], held[i] = _chunk(tokens.take(span), held[i])
    _write(state, batch, held)
    return out.to(v.dtype)


class Tokens(NamedTuple):
    """What the delta rule is told of tokens, float32."""

    q: Tensor  # [T, HV, DK], as long as they are to be
    k: Tensor
    v: Tensor  # [T, HV, DV]
    log_alpha: Tensor  # [T, HV]
    beta: Tensor

    def take(self, rows: Tensor | slice) -> Tokens:
        return Tokens(*(x[rows] for x in self))


def _token(tokens: Tokens, held: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each of B sequences: outputs [B, HV, DV], and their states [B, HV, DK, DV] after it."""
    q, k, v, log_alpha, beta = tokens
    held = held * log_alpha.exp()[..., None, None]
    update = beta.unsqueeze(-1) * (v - torch.einsum("bhkv,bhk->bhv", held, k))
    held += k.unsqueeze(-1) * update.unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", held, q), held


def _chunk(tokens: Tokens, held: Tensor) -> tuple[Tensor, Tensor]:
    """The next C tokens of one sequence at once: outputs [C, HV, DV], and the state [HV, DK, DV] after them.

    The update of token i is u_i = beta_i (v_i - decayed state before it, read with k_i), and that state is what is held
    plus k_j u_j for all j < i, each decayed since: a triangular system (the UT transform of Yang et al. 2024).
    """
    q, k, v = (x.transpose(0, 1) for x in tokens[:3])  # [HV, C, D]
    log_alpha, beta = (x.T.unsqueeze(-1) for x in tokens[3:])  # [HV, C, 1]
    since = log_alpha.cumsum(1)  # the start of the chunk
    later = torch.ones(v.shape[1], v.shape[1], dtype=torch.bool, device=v.device).triu(1)
    decays = (since - since.transpose(1, 2)).masked_fill(later, -torch.inf).exp()  # [HV, C, C]: of j's update, at i
    faded = since.exp()
    system = beta * (k @ k.transpose(1, 2)) * decays  # its diagonal is taken to be 1
    updates = torch.linalg.solve_triangular(system, beta * (v - faded * (k @ held)), upper=False, unitriangular=True)
    out = faded * (q @ held) + (q @ k.transpose(1, 2)) * decays @ updates
    held = faded[:, -1:] * held + (k * decays[:, -1:].transpose(1, 2)).transpose(1, 2) @ updates
    return out.transpose(0, 1), held


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
