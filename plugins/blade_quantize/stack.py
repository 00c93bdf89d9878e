"""A stack of linears whose weights stay in the checkpoint: read when it is called, and let go of again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from blade import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Weights


@dataclass(frozen=True, slots=True)
class Stack:
    """The linears under `prefixes`, one above the other."""

    prefixes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # N and K of each
    weights: Weights
    device: torch.device
    order: Tensor | None = None  # [N] int64: which row of the stack each row of the result is

    @property
    def width(self) -> int:
        """K."""
        return self.shapes[0][1]

    def weight(self) -> Tensor:
        """[N, K] float32, N of all."""
        names = [f"{prefix}.weight" for prefix in self.prefixes]
        weight = torch.cat([self.weights.get(name).to(self.device, torch.float32) for name in names])
        self.weights.release(names)
        return weight

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K] -> [T, N], in x's dtype."""
        y = F.linear(x.float(), weight, self.bias()).to(x.dtype)
        return y if self.order is None else y.index_select(-1, self.order.to(y.device))

    def bias(self) -> Tensor | None:
        names = [f"{prefix}.bias" for prefix in self.prefixes]
        there = set(self.weights.names()).intersection(names)
        if not there:
            return None
        parts = [
            self.weights.get(name) if name in there else torch.zeros(n)
            for name, (n, _) in zip(names, self.shapes, strict=True)
        ]
        return torch.cat([part.to(self.device, torch.float32) for part in parts])


def make_stack(
    prefixes: Seq[str],
    shapes: Seq[tuple[int, int]] | None,
    weights: Weights,
    device: torch.device,
    order: Tensor | None,
) -> Stack:
    """Raises CheckpointError for a matrix that is missing, or of another shape than the model expects."""
    there, found = set(weights.names()), []
    for i, prefix in enumerate(prefixes):
        name = f"{prefix}.weight"
        if name not in there:
            raise CheckpointError(f"The checkpoint has no tensor {name}.")
        shape = tuple(weights.shape(name))
        if len(shape) != 2 or (shapes and shape != tuple(shapes[i])):
            expected = f"; by config.json it would be {tuple(shapes[i])}" if shapes else ""
            raise CheckpointError(f"Tensor {name} has shape {shape}{expected}.")
        found.append((shape[0], shape[1]))
    return Stack(tuple(prefixes), tuple(found), weights, device, order)


class StreamedLinear:
    """contracts.Linear: the stack as its weights say. `rounded`: what becomes of x before; `told`: called with every
    use."""

    def __init__(
        self,
        stack: Stack,
        rounded: Callable[[Tensor], Tensor] | None = None,
        told: Callable[[], None] | None = None,
    ) -> None:
        self._stack, self._rounded, self._told = stack, rounded, told

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        if self._told:
            self._told()
        return self._stack.apply(self._rounded(x) if self._rounded else x, self._stack.weight()).to(
            out_dtype or x.dtype
        )


class Head:
    """contracts.Linear in place of the output head: keeps what it is called with, and gives logits of no tokens."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def states(self) -> Tensor:
        """What the last pass ended in, [R, D]."""
        if self._seen is None:
            raise RuntimeError("the model has no output head that was called")
        return self._seen

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        self._seen = x
        return x.new_empty(len(x), 0, dtype=out_dtype or x.dtype)
