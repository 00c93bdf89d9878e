"""DoRA (Liu et al. 2024): an adapter that says, beside its update, how long the rows of W + scale * B A are to be.

The lengths are taken once, of what the weights of the run stand for. A stack's output without its bias is then
multiplied by what is missing to them, and the update's B is so beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.types import LowRank

Base: TypeAlias = "Callable[[str], tuple[Tensor, Tensor | None]]"  # W [N, K] and bias [N] of a linear, float32


@dataclass(slots=True, frozen=True)
class Gain:
    """By what the rows of a stack are multiplied, biases apart."""

    factors: Tensor  # [N] float32
    bias: Tensor  # [N] float32, zeros where there is none

    def added(self, y: Tensor) -> Tensor:
        """y [T, N] without the update -> what is to be added to it."""
        return ((y.float() - self.bias) * (self.factors - 1)).to(y.dtype)

    def of_rows(self, rows: Tensor) -> Gain:
        return Gain(self.factors[rows], self.bias[rows])

    def to(self, move: Callable[[Tensor], Tensor]) -> Gain:
        return Gain(move(self.factors), move(self.bias))


def read_gain(prefixes: Seq[str], sizes: Seq[int], parts: Seq[LowRank | None], base: Base | None) -> Gain | None:
    """Of linears that are stacked, of `sizes` rows, each with its update; None where none has a magnitude. `base`:
    reads what is under a prefix."""
    if base is None or all(part is None or part.magnitude is None for part in parts):
        return None
    factors = [torch.ones(size) for size in sizes]
    biases = [torch.zeros(size) for size in sizes]
    for i, (prefix, part) in enumerate(zip(prefixes, parts, strict=True)):
        if part is None or part.magnitude is None:
            continue
        weight, bias = base(prefix)
        lengths = torch.addmm(weight, part.b.float(), part.a.float(), alpha=part.scale).norm(dim=1)
        factors[i] = torch.where(lengths > 0, part.magnitude.float() / lengths, 1.0)
        biases[i] = biases[i] if bias is None else bias
    return Gain(torch.cat(factors), torch.cat(biases))
