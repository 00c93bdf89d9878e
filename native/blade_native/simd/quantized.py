"""Linears over quantised matrices of any format that a kernel computes on as it is."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from blade import GroupedWeight, QuantizedWeight
from blade.contracts import Linear
from blade_native.simd import float8, grouped
from blade_native.simd.library import CLinear, Library
from blade_native.simd.linear import PackedLinear, StackedLinear, pack_joined


class DequantizedLinear:
    """contracts.Linear over what was quantised and is dense now, for x of any dtype."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        self._linear, self._dtype = linear, dtype

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, or in `out_dtype`."""
        return self._linear(x if x.dtype is self._dtype else x.to(self._dtype), out_dtype or x.dtype)


def problem(weight: QuantizedWeight) -> str | None:
    """What is not as it should be, beginning with the field's name."""
    return grouped.problem(weight) if isinstance(weight, GroupedWeight) else float8.problem(weight)


def has_kernel(weight: QuantizedWeight) -> bool:
    """Whether kernels compute on such weights, if they are sound."""
    return grouped.has_kernel(weight) if isinstance(weight, GroupedWeight) else float8.has_kernel(weight)


def pack_quantized(
    library: Library, weights: Seq[QuantizedWeight], bias: Tensor | None, threads: int
) -> PackedLinear | StackedLinear:
    """Over sound weights that have kernels. Neighbours of one format become one matrix."""

    def pack(linear: CLinear, weight: QuantizedWeight) -> None:
        if isinstance(weight, GroupedWeight):
            grouped.fill(library, linear, weight, threads)
        else:
            float8.fill(library, linear, weight, threads)

    matrices = [
        grouped.matrix_of(weight) if isinstance(weight, GroupedWeight) else float8.matrix_of(weight)
        for weight in weights
    ]
    return pack_joined(library, matrices, bias, threads, pack)
