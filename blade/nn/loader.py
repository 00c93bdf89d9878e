"""How a model gets its parts out of a checkpoint: one by one, so that loading takes little more than the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.nn.grouped import Dequantized, GroupedQuantization
from blade.nn.lora import AdaptedLinear
from blade.nn.lora_experts import ExpertShapes
from blade.nn.row_order import RowOrder, as_ops
from blade.nn.tensors import check_shape, loaded_bytes, split_name, stacked_bias

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Attention, Experts, Linear, Ops, Quantization, Weights
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
        self._wholes: dict[str, tuple[tuple[str, ...], Tensor]] = {}  # what adapters know as one: its parts, its rows
        if adapters is not None:
            adapters.base = self._base

    def has(self, name: str) -> bool:
        prefix, tensor = split_name(name)
        if name in self._names or tensor != "weight":
            return name in self._names
        return any(there != f"{prefix}.bias" for there in self._modules.get(prefix, ()))

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.ops.to_device(self._get(name, shape, dtype))

    def linear(
        self,
        *prefixes: str,
        shapes: Seq[tuple[int, int]] | None = None,
        order: Tensor | None = None,
        known_as: tuple[str, Tensor] | None = None,
    ) -> Linear:
        linear = self._linear(prefixes, shapes or [None] * len(prefixes), order)
        if self._adapters is None or shapes is None or not all(map(_is_adaptable, prefixes)):
            return linear
        if known_as is None:
            return self._adapters.wrap(prefixes, shapes, linear, order)
        whole, rows = known_as
        self._wholes[whole] = prefixes, rows
        return self._adapters.wrap((whole,), [(sum(n for n, _ in shapes), shapes[0][1])], linear, rows)

    def experts(self, prefix: str, gate_up: Seq[Linear], down: Seq[Linear], shape: tuple[int, int]) -> Experts:
        experts = self._mixture(gate_up, down)
        if self._adapters is None:
            return experts
        shapes = ExpertShapes(len(down), *shape, transposed=getattr(self._weights, "transposed", False))
        return self._adapters.wrap_experts(prefix, shapes, experts, gate_up, down)

    def _base(self, prefix: str) -> tuple[Tensor, Tensor | None]:
        """What the matrix under a prefix stands for, and its bias, read once more: float32."""
        if prefix in self._wholes:
            prefixes, rows = self._wholes[prefix]
            parts = [self._base(part)[0] for part in prefixes]
            bias = stacked_bias(prefixes, [len(part) for part in parts], self._weights, torch.float32)
            return _back(torch.cat(parts), rows), None if bias is None else _back(bias, rows)
        numbers = getattr(self._quantization, "numbers", None)
        exact = torch.float32
        weight = numbers(prefix, self._weights, exact) if numbers else self._weights.get(f"{prefix}.weight", exact)
        bias = self._weights.get(f"{prefix}.bias", exact) if self.has(f"{prefix}.bias") else None
        return weight, bias

    def embedding(
        self, prefix: str, shape: tuple[int, int] | None = None, tied: Linear | None = None
    ) -> Callable[[Tensor], Tensor]:
        rows = self._rows(prefix, shape, tied.base if isinstance(tied, AdaptedLinear) else tied)
        return rows if self._adapters is None or shape is None else self._adapters.wrap_embedding(prefix, shape, rows)

    def _linear(self, prefixes: tuple[str, ...], shapes: Seq[tuple[int, int] | None], order: Tensor | None) -> Linear:
        ops = self.ops if order is None else as_ops(RowOrder(self.ops, order))
        return self._quantized(prefixes, shapes, ops) or self._plain(prefixes, shapes, ops)

    def _mixture(self, gate_up: Seq[Linear], down: Seq[Linear]) -> Experts:
        return self.ops.experts(gate_up, down)

    def _rows(self, prefix: str, shape: tuple[int, int] | None, tied: Linear | None) -> Callable[[Tensor], Tensor]:
        table = tied or self._quantized((prefix,), [shape], self.ops)
        rows = self.ops.embedding_of(table, self.dtype) if table else None
        return rows or self.ops.embedding(self._table(prefix, shape))

    def _table(self, prefix: str, shape: tuple[int, int] | None) -> Tensor:
        """An embedding's plain numbers; it is in already where it is quantised, and nothing is told of it."""
        quantization = self._quantization
        if isinstance(quantization, Dequantized | GroupedQuantization) and quantization.holds(prefix, self._weights):
            return self.ops.to_device(quantization.numbers(prefix, self._weights, self.dtype))
        return self.tensor(f"{prefix}.weight", shape)

    def _quantized(self, prefixes: tuple[str, ...], shapes: Seq[tuple[int, int] | None], ops: Ops) -> Linear | None:
        if self._quantization is None:
            return None
        linear = self._quantization.linear(prefixes, shapes, self._weights, ops, self.dtype)
        if linear is not None:
            names = [name for prefix in prefixes for name in self._modules[prefix]]
            self._weights.release(names)
            for name in names:
                self._report(name, self._quantization)
        return linear

    def _plain(self, prefixes: tuple[str, ...], shapes: Seq[tuple[int, int] | None], ops: Ops) -> Linear:
        weights = [self._get(f"{prefix}.weight", shape) for prefix, shape in zip(prefixes, shapes, strict=True)]
        bias = stacked_bias(prefixes, [len(weight) for weight in weights], self._weights, self.dtype)
        for prefix in prefixes:
            if self.has(f"{prefix}.bias"):
                self._report(f"{prefix}.bias")
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights  # or they would be held while the stack is packed
        linear = ops.linear(weight, bias)
        self._weights.release([f"{prefix}.weight" for prefix in prefixes])
        return linear

    def _get(self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype | None = None) -> Tensor:
        check_shape(name, self._weights, shape)
        tensor = self._weights.get(name, dtype or self.dtype)
        self._report(name)
        return tensor

    def _report(self, name: str, quantization: Quantization | None = None) -> None:
        """A tied embedding may be loaded twice; it counts once."""
        if self._progress is not None and name not in self._loaded:
            self._loaded.add(name)
            self._progress(loaded_bytes(name, self._weights, self.ops, self.dtype, quantization))


def _back(stack: Tensor, rows: Tensor) -> Tensor:
    """Row i of the stack as row rows[i]."""
    return torch.empty_like(stack).index_copy_(0, rows, stack)


def _is_adaptable(prefix: str) -> bool:
    """The output head, which may be an embedding's tensors, and the layers' linears; experts are adapted as a
    mixture, not one by one."""
    inside = ".layers." in prefix or ".h." in prefix
    return ".experts." not in prefix and (inside or prefix.rpartition(".")[2] in ("lm_head", "embed_tokens"))
