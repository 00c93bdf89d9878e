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


def split_name(name: str) -> tuple[str, str]:
    """The module and what it calls the tensor: "a.b.bias" is ("a.b", "bias"), "a.weight.absmax" ("a",
    "weight.absmax")."""
    prefix, dot, rest = name.partition(".weight.")
    if dot:
        return prefix, f"weight.{rest}"
    prefix, _, tensor = name.rpartition(".")
    return prefix, tensor


def check_shape(name: str, weights: Weights, shape: tuple[int, ...] | None) -> None:
    """Raise CheckpointError for a tensor that is missing, or of another shape; None is any."""
    if name not in weights.names():
        raise CheckpointError(f"The checkpoint has no tensor {name}.", _instead(name, weights))
    check_expected(name, tuple(weights.shape(name)), shape)


def _instead(name: str, weights: Weights) -> str:
    """The remedy where what is missing is there in a form that config.json says nothing of."""
    prefix, own = split_name(name)
    others = (there for there in weights.names() if there.startswith(f"{prefix}.") and there != f"{prefix}.bias")
    found = next(others, None) if own == "weight" else None
    return f"It has {found}: for quantised weights config.json needs its quantization_config." if found else ""


class WrongShape(CheckpointError):
    """A tensor, or what it holds, has another shape than the model's."""

    def __init__(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        super().__init__(f"Tensor {name} has shape {found}; by config.json it would be {expected}.")
        self.name, self.found, self.expected = name, found, expected


def check_expected(name: str, found: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    """Raise WrongShape where what the tensor holds is of another shape than the model's."""
    if shape is not None and found != shape:
        raise WrongShape(name, found, shape)


def stacked_bias(prefixes: Seq[str], sizes: Seq[int], weights: Weights, dtype: torch.dtype) -> Tensor | None:
    """The biases under `prefixes`, of `sizes` numbers each, end to end; zeros for one that is missing, None where all
    are."""
    names = [f"{prefix}.bias" for prefix in prefixes]
    there = {name for name in names if name in weights.names()}
    if not there:
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


def num_params(weights: Weights, quantization: Quantization | None) -> int:
    """Numbers in all tensors; of formats that pack them, where these can say how many there are."""
    count = getattr(quantization, "num_params", lambda name, weights: None)
    packed = {name: count(name, weights) for name in weights.names()}
    return sum(prod(weights.shape(name)) if found is None else found for name, found in packed.items())
