"""Weight formats whose matrices are `blade.QuantizedWeight`s, which op sets compute on as they are."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch

from blade.contracts import Weights
from blade.errors import ConfigError
from blade.nn.dequantize import dequantize
from blade.nn.tensors import check_expected, check_shape, split_name, stacked_bias

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Linear, Ops
    from blade.types import GGMLBlocks, GroupedWeight, QuantizedWeight

log = logging.getLogger("blade.formats")


@dataclass(slots=True, frozen=True)
class Matrix:
    """What the headers of a checkpoint say of a quantised matrix."""

    shape: tuple[int, ...]  # N and K
    num_bytes: int  # that its QuantizedWeight takes, the integers packed
    plain: bool = False  # no kernel computes on its groups: it becomes plain numbers of the run's dtype


class GroupedQuantization(ABC):
    """contracts.Quantization: a subclass says what is quantised, and makes the matrices one at a time."""

    tensors: Seq[str] = ("weight",)
    """What a matrix is known by: the first of these there is under its prefix. It is counted for that one; what else
    belongs to it counts nothing, but the bias."""

    @abstractmethod
    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        """What is under `prefix` ("model.layers.0.mlp.up_proj"), if it is quantised; read from the headers alone. There
        is one of `tensors`."""

    @abstractmethod
    def weight(self, prefix: str, weights: Weights) -> QuantizedWeight:
        """The matrix that `matrix` told of, on the CPU; in groups of any size where that is to become plain."""

    def num_bytes(self, name: str, weights: Weights, ops: Ops, dtype: torch.dtype) -> int | None:
        check_kernels(ops, dtype)
        return self.counted(
            name, weights, lambda found: prod(found.shape) * dtype.itemsize if found.plain else found.num_bytes
        )

    def num_params(self, name: str, weights: Weights) -> int | None:
        """Numbers that a tensor stands for; None where it is plain."""
        return self.counted(name, weights, lambda matrix: prod(matrix.shape))

    def linear(
        self, prefixes: Seq[str], shapes: Seq[tuple[int, int] | None], weights: Weights, ops: Ops, dtype: torch.dtype
    ) -> Linear | None:
        """Where some of the matrices are plain, or are to be, those and the others are linears of their own, side by
        side."""
        check_kernels(ops, dtype)
        found = self.matrices(prefixes, shapes, weights)
        if not any(found.values()):
            return None
        for prefix, matrix in found.items():
            if matrix and matrix.plain:
                self._tell_plain(prefix)
        sizes = {prefix: matrix.shape[0] for prefix, matrix in found.items() if matrix and not matrix.plain}
        parts: list[Linear] = []
        for quantized, run in groupby(prefixes, lambda prefix: prefix in sizes):
            names = list(run)
            if quantized:
                bias = stacked_bias(names, [sizes[name] for name in names], weights, dtype)
                parts.append(self.stack(names, weights, ops, bias))
            else:
                parts.append(self.plain(names, weights, ops, dtype))
        return parts[0] if len(parts) == 1 else SideBySide(parts, ops)

    def stack(self, prefixes: Seq[str], weights: Weights, ops: Ops, bias: Tensor | None) -> Linear:
        """The linear over these matrices. A subclass may know a shorter way to it than `weight`."""
        return ops.quantized_linear([self.weight(prefix, weights) for prefix in prefixes], bias)

    def plain(self, prefixes: Seq[str], weights: Weights, ops: Ops, dtype: torch.dtype) -> Linear:
        """The linear over these matrices in `dtype`, quantised or not."""
        parts = [self.numbers(prefix, weights, dtype) for prefix in prefixes]
        bias = stacked_bias(prefixes, [len(part) for part in parts], weights, dtype)
        return ops.linear(parts[0] if len(parts) == 1 else torch.cat(parts), bias)

    def find(self, prefix: str, weights: Weights) -> tuple[str, Matrix | None]:
        """The name of the tensor that is there, or "", and its matrix unless it is plain."""
        names = weights.names()
        name = next((name for tensor in self.tensors if (name := f"{prefix}.{tensor}") in names), "")
        return name, self.matrix(prefix, weights) if name else None

    def matrices(
        self, prefixes: Seq[str], shapes: Seq[tuple[int, int] | None], weights: Weights
    ) -> dict[str, Matrix | None]:
        """What is under each, None where it is plain. Raises CheckpointError for a shape that is not the expected
        one."""
        matrices = {}
        for prefix, shape in zip(prefixes, shapes, strict=True):
            name, matrix = self.find(prefix, weights)
            if matrix is None:
                check_shape(f"{prefix}.weight", weights, shape)
            else:
                check_expected(name, matrix.shape, shape)
            matrices[prefix] = matrix
        return matrices

    def holds(self, prefix: str, weights: Weights) -> bool:
        """Whether the matrix is quantised in the checkpoint."""
        return self.find(prefix, weights)[1] is not None

    @cached_property
    def _told_plain(self) -> set[str]:
        return set()

    def _tell_plain(self, prefix: str) -> None:
        """Once for the same matrix of all layers."""
        pattern = re.sub(r"\.\d+\.", ".*.", prefix)
        if pattern not in self._told_plain:
            self._told_plain.add(pattern)
            log.warning("%s becomes plain numbers: no kernel computes on groups as it has them", pattern)

    def counted(self, name: str, weights: Weights, count: Callable[[Matrix], int]) -> int | None:
        """The count of the matrix that a tensor belongs to, for one of its tensors; 0 for the others. None for what is
        plain, as a bias is."""
        prefix, tensor = split_name(name)
        if tensor == "bias":
            return None
        main, matrix = self.find(prefix, weights)
        if matrix is None:
            return None
        return count(matrix) if name == main else 0

    def numbers(self, prefix: str, weights: Weights, dtype: torch.dtype) -> Tensor:
        """A matrix [N, K] in `dtype`, quantised or not."""
        if not self.holds(prefix, weights):
            return weights.get(f"{prefix}.weight", dtype)
        return dequantize(self.weight(prefix, weights), dtype)


class Dequantized:
    """contracts.Quantization: a format whose matrices become plain numbers of the run's dtype."""

    def __init__(self, quantization: GroupedQuantization) -> None:
        self._format = quantization

    def num_bytes(self, name: str, weights: Weights, ops: Ops, dtype: torch.dtype) -> int | None:
        return self._format.counted(name, weights, lambda matrix: prod(matrix.shape) * dtype.itemsize)

    def num_params(self, name: str, weights: Weights) -> int | None:
        return self._format.num_params(name, weights)

    def linear(
        self, prefixes: Seq[str], shapes: Seq[tuple[int, int] | None], weights: Weights, ops: Ops, dtype: torch.dtype
    ) -> Linear | None:
        if not any(self._format.matrices(prefixes, shapes, weights).values()):
            return None
        return self._format.plain(prefixes, weights, ops, dtype)

    def holds(self, prefix: str, weights: Weights) -> bool:
        """As GroupedQuantization.holds."""
        return self._format.holds(prefix, weights)

    def numbers(self, prefix: str, weights: Weights, dtype: torch.dtype) -> Tensor:
        """The matrix, [N, K]."""
        return self._format.numbers(prefix, weights, dtype)


class SideBySide:
    """contracts.Linear: linears over one input, their outputs end to end; by ops alone, so that steps are captured."""

    def __init__(self, linears: Seq[Linear], ops: Ops) -> None:
        self.linears, self._ops = linears, ops

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        parts = [linear(x, out_dtype) for linear in self.linears]
        out, start = parts[0].new_empty(len(x), sum(part.shape[1] for part in parts)), 0
        for part in parts:
            self._ops.copy_rows(part, out[:, start : start + part.shape[1]])
            start += part.shape[1]
        return out


def check_kernels(ops: Ops, dtype: torch.dtype) -> None:
    """Raise ConfigError where the op set cannot compute on quantised weights."""
    if dtype in ops.quantized_dtypes:
        return
    known = ", ".join(sorted(_name(known) for known in ops.quantized_dtypes))
    raise ConfigError(
        f"The device ({ops.name}) has no kernels for quantised weights{f' in {_name(dtype)}' if known else ''}.",
        f"Use --dtype {known}." if known else "Leave --quantize out, or choose another --device.",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class StoredWeights(Weights, Protocol):
    """Weights of a file that holds grouped weights, as GGUF's blocks are."""

    def grouped_bytes(self, name: str) -> int | None:
        """Bytes of what `grouped` gives, its integers packed; None for plain numbers and for what is no matrix."""
        ...

    def grouped(self, name: str) -> GroupedWeight:
        """The matrix as it is stored, without loss."""
        ...

    def blocks(self, name: str) -> GGMLBlocks:
        """The same matrix in the file's own bytes."""
        ...


class Stored(GroupedQuantization):
    """The matrices as `weights`, the checkpoint's own, has them stored."""

    def __init__(self, weights: StoredWeights) -> None:
        self._stored = weights

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        name = f"{prefix}.weight"
        num_bytes = self._stored.grouped_bytes(name)
        return None if num_bytes is None else Matrix(weights.shape(name), num_bytes)

    def weight(self, prefix: str, weights: Weights) -> QuantizedWeight:
        return self._stored.grouped(f"{prefix}.weight")

    def stack(self, prefixes: Seq[str], weights: Weights, ops: Ops, bias: Tensor | None) -> Linear:
        """Straight from the file's bytes, where the op set can."""
        linear = ops.blocks_linear([self._stored.blocks(f"{prefix}.weight") for prefix in prefixes], bias)
        return linear or super().stack(prefixes, weights, ops, bias)
