"""Checkpoints that keep all experts of a layer in one tensor, seen as if each expert had tensors of its own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch
    from torch import Tensor

    from blade.contracts import Weights

_FUSED = re.compile(r"(?P<module>.+\.experts)\.(?P<kind>gate_up_proj|down_proj)")


class SplitExperts:
    """contracts.Weights: of X.experts.gate_up_proj [E, 2 I, D] and X.experts.down_proj [E, D, I] the matrices
    X.experts.E.{gate,up,down}_proj.weight, read one at a time; other tensors as they are."""

    def __init__(self, weights: Weights, transposed: bool = False, adapted: bool | None = None) -> None:
        """`transposed`: they are [E, D, 2 I] and [E, I, D]; `adapted`: so are those that adapters were trained over,
        where they lie otherwise there."""
        self._weights, self._transposed = weights, transposed
        self.transposed = transposed if adapted is None else adapted  # what blade.nn.Loader tells adapters
        self._parts: dict[str, tuple[str, int, int | None]] = {}  # fused tensor, expert, 0 gate, 1 up, None down
        self._left: dict[str, set[str]] = {}  # parts of each fused tensor that are still in use
        self._names = dict.fromkeys(name for name in weights.names() if not self._split(name)) | self._parts

    def names(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return self._weights.shape(name)
        fused, _, half = self._parts[name]
        _, n, k = self._weights.shape(fused)
        n, k = (k, n) if self._transposed else (n, k)
        return (n if half is None else n // 2, k)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._parts:
            return self._weights.get(name, dtype)
        fused, expert, half = self._parts[name]
        matrix = self._weights.get(fused)[expert]  # in its own dtype: nothing is copied but the expert
        matrix = matrix.T if self._transposed else matrix
        matrix = matrix if half is None else matrix.chunk(2)[half]
        return matrix.to(dtype or matrix.dtype).contiguous()

    def release(self, names: Iterable[str]) -> None:
        """A fused tensor once all of its parts are."""
        whole = []
        for name in names:
            if name not in self._parts:
                whole.append(name)
                continue
            fused = self._parts[name][0]
            self._left[fused].discard(name)
            if not self._left[fused]:
                whole.append(fused)
        self._weights.release(whole)

    def _split(self, name: str) -> bool:
        match = _FUSED.fullmatch(name)
        shape = self._weights.shape(name) if match else ()
        if match is None or len(shape) != 3:
            return False
        halves = (("gate_proj", 0), ("up_proj", 1)) if match["kind"] == "gate_up_proj" else (("down_proj", None),)
        parts = {
            f"{match['module']}.{expert}.{kind}.weight": (name, expert, half)
            for expert in range(shape[0])
            for kind, half in halves
        }
        self._parts |= parts
        self._left[name] = set(parts)
        return True
