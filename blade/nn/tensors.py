"""Tensors out of a checkpoint, checked: each has the shape that the model expects, or the error names it."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Ops, Quantization, Weights


def check_shape(name: str, weights: Weights, shape: tuple[int, ...] | None) -> None:
    """Raise CheckpointError for a tensor that is missing, or of another shape; None is any."""
    if name not in weights.names():
        raise CheckpointError(f"The checkpoint has no tensor {name}.")
    found = tuple(weights.shape(name))
    if shape is not None and found != shape:
        raise CheckpointError(f"Tensor {name} has shape {found}; by config.json it would be {shape}.")


def stacked_bias(prefixes: Seq[str], sizes: Seq[int], weights: Weights, dtype: torch.dtype) -> Tensor | None:
    """The biases under `prefixes`, of `sizes` numbers each, end to end; zeros for one that is missing, None where all
    are."""
    names, there = [f"{prefix}.bias" for prefix in prefixes], set(weights.names())
    if there.isdisjoint(names):
        return None
    for name, size in zip(names, sizes, strict=True):
        if name in there:
            check_shape(name, weights, (size,))
    parts = zip(names, sizes, strict=True)
    return torch.cat(
        [weights.get(name, dtype) if name in there else torch.zeros(size, dtype=dtype) for name, size in parts]
    )


def loaded_bytes(
    name: str, weights: Weights, ops: Ops, dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """Bytes of memory that a tensor takes once it is loaded: in `dtype`, unless its format is another."""
    quantized = quantization.num_bytes(name, weights, ops, dtype) if quantization else None
    return prod(weights.shape(name)) * dtype.itemsize if quantized is None else quantized
