"""Adapters of experts: their linears are called by a kernel of the whole mixture, which knows no adapters, so that rows
whose adapter changes an expert are computed once more, expert by expert.

PEFT has updates of experts in two forms: of linears of their own, `experts.3.up_proj`; and, as `target_parameters`, of
what transformers 5 keeps all experts of a layer in, `gate_up_proj` and `down_proj`. The latter's tensors are under
`experts` and, the second one, `experts.base_layer`: A [E r, K], expert by expert, and B [N, r E], rank by rank; where
matrices are kept transposed, as Llama 4's, N and K are those of the transposed ones. Which of the two one is of, and
so its rank and scale, only its shape says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from blade.errors import CheckpointError
from blade.types import LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Experts, Linear
    from blade.nn.lora import Adapters, Update

Updates: TypeAlias = "Seq[tuple[Update | None, Update | None]]"  # of each expert: of gate and up, and of down
BASE = ".base_layer"


@dataclass(slots=True, frozen=True)
class ExpertShapes:
    """Of one mixture: feed-forward networks outer -> inner -> outer."""

    num: int
    inner: int
    outer: int
    transposed: bool = False  # in the tensors of all experts

    @property
    def gate_up(self) -> list[tuple[int, int]]:
        return [(self.inner, self.outer)] * 2

    @property
    def down(self) -> list[tuple[int, int]]:
        return [(self.outer, self.inner)]


def split_experts(name: str, prefix: str, shapes: ExpertShapes, updates: dict[str, LowRank]) -> None:
    """Replace the updates of all experts under `prefix` in one by those of each expert's linears. Raises
    CheckpointError where they are of another mixture."""
    for key in (prefix, prefix + BASE):
        if key not in updates:
            continue
        part = updates.pop(key)
        n, k = len(part.b), part.a.shape[1]
        n, k = (k, n) if shapes.transposed else (n, k)
        kind = {(2 * shapes.inner, shapes.outer): "gate_up_proj", (shapes.outer, shapes.inner): "down_proj"}.get((n, k))
        rank, scale = (part.experts or {}).get(kind or "", (0, 0.0))
        if len(part.a) != shapes.num * rank:
            raise CheckpointError(
                f"The adapter {name!r} has an update of rank {len(part.a)}, of all experts, of ({n}, {k}) matrices "
                f"under {prefix}, which has {shapes.num} experts, {shapes.outer} to {shapes.inner} and back"
                + (f"; by adapter_config.json each is of rank {rank}." if rank else ".")
            )
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for expert, (a, b) in enumerate(_parts(part, shapes)):
            for linear, rows in zip(names, b.chunk(len(names)), strict=True):
                updates[f"{prefix}.{expert}.{linear}"] = LowRank(a, rows, scale)


def _parts(part: LowRank, shapes: ExpertShapes) -> list[tuple[Tensor, Tensor]]:
    """A [r, K] and B [N, r] of each expert."""
    b = part.b.view(len(part.b), -1, shapes.num).permute(2, 0, 1)
    pairs = zip(part.a.view(shapes.num, -1, part.a.shape[1]), b, strict=True)
    return [(b.T, a.T) if shapes.transposed else (a, b) for a, b in pairs]


class AdaptedExperts:
    """contracts.Experts: others and what adapters make of them."""

    def __init__(self, base: Experts, gate_up: Seq[Linear], down: Seq[Linear], prefix: str, adapters: Adapters) -> None:
        self._base, self._gate_up, self._down = base, gate_up, down
        self._prefix, self._adapters = prefix, adapters

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, weigh_input: bool = False) -> Tensor:
        y = self._base(x, ids, weights, weigh_input)
        for adapter, rows in self._adapters.of(len(x)):
            updates = adapter.experts.get(self._prefix)
            if updates is None:
                continue
            at = torch.arange(len(x), device=x.device) if rows is None else rows
            y[at] = self._mixed(x[at], ids[at], weights[at], weigh_input, updates)
        return y

    def _mixed(self, x: Tensor, ids: Tensor, weights: Tensor, weigh_input: bool, updates: Updates) -> Tensor:
        """As DefaultOps does it, with the updates."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in torch.unique(ids).tolist():
            rows, places = (ids == expert).nonzero(as_tuple=True)
            gate_up, down = updates[expert]
            inner, shares = x[rows], weights[rows, places, None]
            inner = inner * shares.to(x.dtype) if weigh_input else inner
            inner = self._adapters.ops.silu_mul(_adapted(self._gate_up[expert], gate_up, inner, x.dtype))
            y = _adapted(self._down[expert], down, inner, torch.float32)
            out.index_add_(0, rows, y if weigh_input else y * shares)
        return out.to(x.dtype)


def _adapted(linear: Linear, update: Update | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    y = linear(x, dtype)
    return y if update is None else y + update.added(x, y)
