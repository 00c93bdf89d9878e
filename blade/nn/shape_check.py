"""Whether a checkpoint's tensors have the shapes that a model expects, by their headers alone: the model is built
through a loader that checks what it is asked for and loads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

from blade.nn.loader import Loader
from blade.nn.tensors import check_shape

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Linear

Shape: TypeAlias = "tuple[int, int] | None"


class ShapeCheck(Loader):
    """contracts.Loader of stand-ins: tensors without numbers, linears that cannot be called. Raises CheckpointError for
    a tensor that is missing or of another shape than the model's, as Loader does. What a plugin's weight format says of
    shapes is found while loading alone, unless it has `sizes`, as blade.nn.GroupedQuantization. `adapters` can be made
    afterwards: they are checked against the model too."""

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        check_shape(name, self._weights, shape)
        return torch.empty(self._weights.shape(name), dtype=dtype or self.dtype, device="meta")

    def _linear(self, prefixes: tuple[str, ...], shapes: Seq[Shape], order: Tensor | None = None) -> Unloaded:
        sizes_of = getattr(self._quantization, "sizes", None)
        if self._quantization is not None and sizes_of is None:
            return Unloaded()
        sizes = sizes_of(prefixes, shapes, self._weights) if sizes_of else {}
        for prefix, shape in zip(prefixes, shapes, strict=True):
            weight, size = f"{prefix}.weight", sizes.get(prefix)
            if not size:
                check_shape(weight, self._weights, shape)
                size = self._weights.shape(weight)[0]
            if self.has(f"{prefix}.bias"):
                check_shape(f"{prefix}.bias", self._weights, (size,))
        return Unloaded()

    def _mixture(self, gate_up: Seq[Linear], down: Seq[Linear]) -> Unloaded:
        return Unloaded()

    def _rows(self, prefix: str, shape: Shape, tied: Linear | None) -> Unloaded:
        return self._linear((prefix,), [shape]) if tied is None else Unloaded()


class Unloaded:
    """In place of a linear, an embedding or experts."""

    def __call__(self, *arguments: Any, **named: Any) -> NoReturn:
        raise TypeError("nothing has been loaded: the shapes of a checkpoint's tensors were to be checked")
