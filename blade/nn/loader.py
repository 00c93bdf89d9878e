"""How a model gets its parts out of a checkpoint: one by one, so that loading takes little more than the result."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Attention, Linear, Ops, Quantization, Weights


class Loader:
    """contracts.Loader of one checkpoint for one device.

    `progress` is called once for each tensor that is in, with its size in bytes: parameters times the run dtype's.
    A tensor that is missing, or has another shape than the model expects, raises CheckpointError naming it.
    """

    def __init__(
        self,
        weights: Weights,
        ops: Ops,
        attention: Attention,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.ops = ops
        self.attention = attention
        self.dtype = dtype
        self._weights = weights
        self._names = frozenset(weights.names())
        self._quantization = quantization
        self._progress = progress
        self._loaded: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.ops.to_device(self._get(name, shape))

    def linear(self, *prefixes: str, shapes: Seq[tuple[int, int]] | None = None) -> Linear:
        return self._quantized(prefixes) or self._plain(prefixes, shapes or [None] * len(prefixes))

    def _quantized(self, prefixes: tuple[str, ...]) -> Linear | None:
        if self._quantization is None:
            return None
        linear = self._quantization.linear(prefixes, self._weights, self.ops, self.dtype)
        if linear is not None:
            for name in self._names:
                if name.rpartition(".")[0] in prefixes:
                    self._report(name)
        return linear

    def _plain(self, prefixes: tuple[str, ...], shapes: Seq[tuple[int, int] | None]) -> Linear:
        weights = [self._get(f"{prefix}.weight", shape) for prefix, shape in zip(prefixes, shapes, strict=True)]
        biases = None
        if any(self.has(f"{prefix}.bias") for prefix in prefixes):
            biases = [self._bias(prefix, len(weight)) for prefix, weight in zip(prefixes, weights, strict=True)]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights  # or they would be held while the stack is packed
        return self.ops.linear(weight, None if biases is None else torch.cat(biases))

    def _bias(self, prefix: str, num_out: int) -> Tensor:
        name = f"{prefix}.bias"
        return self._get(name, (num_out,)) if self.has(name) else torch.zeros(num_out, dtype=self.dtype)

    def _get(self, name: str, shape: tuple[int, ...] | None) -> Tensor:
        if not self.has(name):
            raise CheckpointError(f"The checkpoint has no tensor {name}.")
        found = tuple(self._weights.shape(name))
        if shape is not None and found != shape:
            raise CheckpointError(f"Tensor {name} has shape {found}; by config.json it would be {shape}.")
        tensor = self._weights.get(name, self.dtype)
        self._report(name)
        return tensor

    def _report(self, name: str) -> None:
        """A tied embedding is loaded twice; it counts once."""
        if self._progress is not None and name not in self._loaded:
            self._loaded.add(name)
            self._progress(prod(self._weights.shape(name)) * self.dtype.itemsize)
