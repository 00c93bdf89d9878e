"""How a model gets its parts out of a checkpoint: one by one, so that loading takes little more than the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.nn.tensors import check_shape, loaded_bytes, split_name, stacked_bias

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Attention, Linear, Ops, Quantization, Weights
    from blade.nn.lora import Adapters


class Loader:
    """contracts.Loader of one checkpoint for one device.

    `progress` is called once for each tensor that is in, with the bytes it takes there: parameters times the run
    dtype's, or what the quantization says. `adapters` is told of the linears that it may change. A tensor that is
    missing, or has another shape than the model expects, raises CheckpointError naming it.
    """

    def __init__(
        self,
        weights: Weights,
        ops: Ops,
        attention: Attention,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        progress: Callable[[int], None] | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.ops = ops
        self.attention = attention
        self.dtype = dtype
        self._weights = weights
        self._names = frozenset(weights.names())
        self._modules: dict[str, list[str]] = {}  # the tensors of each
        for name in weights.names():
            self._modules.setdefault(split_name(name)[0], []).append(name)
        self._quantization = quantization
        self._progress = progress
        self._adapters = adapters
        self._loaded: set[str] = set()

    def has(self, name: str) -> bool:
        prefix, tensor = split_name(name)
        if name in self._names or tensor != "weight":
            return name in self._names
        return any(there != f"{prefix}.bias" for there in self._modules.get(prefix, ()))

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.ops.to_device(self._get(name, shape))

    def linear(self, *prefixes: str, shapes: Seq[tuple[int, int]] | None = None) -> Linear:
        expected: Seq[tuple[int, int] | None] = shapes or [None] * len(prefixes)
        linear = self._quantized(prefixes, expected) or self._plain(prefixes, expected)
        if self._adapters is None or shapes is None or not all(map(_is_adaptable, prefixes)):
            return linear
        return self._adapters.wrap(prefixes, shapes, linear)

    def embedding(
        self, prefix: str, shape: tuple[int, int] | None = None, tied: Linear | None = None
    ) -> Callable[[Tensor], Tensor]:
        table = tied or self._quantized((prefix,), [shape])
        rows = self.ops.embedding_of(table, self.dtype) if table else None
        return rows or self.ops.embedding(self.tensor(f"{prefix}.weight", shape))

    def _quantized(self, prefixes: tuple[str, ...], shapes: Seq[tuple[int, int] | None]) -> Linear | None:
        if self._quantization is None:
            return None
        linear = self._quantization.linear(prefixes, shapes, self._weights, self.ops, self.dtype)
        if linear is not None:
            names = [name for prefix in prefixes for name in self._modules[prefix]]
            self._weights.release(names)
            for name in names:
                self._report(name, self._quantization)
        return linear

    def _plain(self, prefixes: tuple[str, ...], shapes: Seq[tuple[int, int] | None]) -> Linear:
        weights = [self._get(f"{prefix}.weight", shape) for prefix, shape in zip(prefixes, shapes, strict=True)]
        bias = stacked_bias(prefixes, [len(weight) for weight in weights], self._weights, self.dtype)
        for prefix in prefixes:
            if self.has(f"{prefix}.bias"):
                self._report(f"{prefix}.bias")
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights  # or they would be held while the stack is packed
        linear = self.ops.linear(weight, bias)
        self._weights.release([f"{prefix}.weight" for prefix in prefixes])
        return linear

    def _get(self, name: str, shape: tuple[int, ...] | None) -> Tensor:
        check_shape(name, self._weights, shape)
        tensor = self._weights.get(name, self.dtype)
        self._report(name)
        return tensor

    def _report(self, name: str, quantization: Quantization | None = None) -> None:
        """A tied embedding may be loaded twice; it counts once."""
        if self._progress is not None and name not in self._loaded:
            self._loaded.add(name)
            self._progress(loaded_bytes(name, self._weights, self.ops, self.dtype, quantization))


def _is_adaptable(prefix: str) -> bool:
    """Of the layers' linears; experts are called by their mixture, not one by one."""
    return ".layers." in prefix and ".experts." not in prefix
