"""Matrices of 8-bit and 4-bit floats, as checkpoints have them: Float8Weights, and FP4 as a GroupedWeight over a table.

After the OCP 8-bit Floating Point Specification 1.0 and the OCP Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.errors import CheckpointError
from blade.nn.grouped import Matrix
from blade.nn.packing import FLOATS, checked, kept_group, matrix_of, matrix_shape, narrow, regroup, unpack
from blade.types import Float8Weight, GroupedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Weights

FP8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
E2M1 = tuple(sign * x for sign in (1, -1) for x in (0, 1, 2, 3, 4, 6, 8, 12))
"""Twice the values of FP4 by their codes: 1 bit of sign, 2 of exponent, 1 of mantissa."""


def float8_matrix(name: str, weights: Weights, scales: str) -> Matrix:
    """By the headers of the matrix and its scales."""
    n, k = matrix_shape(name, weights)
    num_scales = 1
    for size in weights.shape(scales) if scales in weights.names() else ():
        num_scales *= size
    return Matrix((n, k), n * k + 4 * num_scales)


def float8_weight(name: str, weights: Weights, scales: str, block: tuple[int, int]) -> Float8Weight:
    """The matrix `name` [N, K] with a scale for each block of so many rows and columns; the scales may be flat where
    there is one per row, or one."""
    n, k = matrix_shape(name, weights)
    block = min(block[0], n), min(block[1], k)
    shape = -(-n // block[0]), -(-k // block[1])
    values = float_scales(scales, weights)
    flat = values.dim() < 2 and shape[1] == 1
    if values.numel() != shape[0] * shape[1] or not (flat or tuple(values.shape) == shape):
        raise CheckpointError(f"Tensor {scales} has shape {tuple(values.shape)}; to {name} belongs {shape}.")
    return Float8Weight(checked(name, weights, (n, k), FP8), values.float().reshape(shape).contiguous(), block)


def float_scales(name: str, weights: Weights, shape: tuple[int, ...] | None = None) -> Tensor:
    """Scales as any float, or as powers of two by their exponent (E8M0, 127 is 1): float32, all of them finite."""
    stored = checked(name, weights, shape, *FLOATS, FP8, E8M0, torch.uint8)
    exponents = stored.dtype in (E8M0, torch.uint8)
    scales = torch.exp2(stored.view(torch.uint8).float() - 127) if exponents else stored.float()
    if not bool(scales.isfinite().all()) or (exponents and bool((stored.view(torch.uint8) == 255).any())):
        raise CheckpointError(f"Tensor {name} holds infinity or NaN.")
    return scales


def fp4_matrix(name: str, weights: Weights, group: int) -> Matrix:
    """By the header of the codes [N, K / 2], two to a byte."""
    n, half = matrix_shape(name, weights)
    kept = kept_group(2 * half, group)
    return matrix_of(n, 2 * half, kept, n * half + 2 * n * (2 * half // kept))


def fp4_weight(name: str, weights: Weights, scales: str, group: int, factor: float = 1.0) -> GroupedWeight:
    """The codes `name` [N, K / 2] uint8, the first of two in the low bits; w = value * scale * factor."""
    n, half = matrix_shape(name, weights)
    k = 2 * half
    kept = kept_group(k, group)
    values = float_scales(scales, weights, (n, -(-k // group))) * (factor / 2)
    q = unpack(checked(name, weights, (n, half), torch.uint8), 4, k)
    return GroupedWeight(4, kept, q, narrow(regroup(values, k, group, kept)), values=E2M1)


def one_number(name: str, weights: Weights) -> float:
    """Of a tensor that holds one, positive and finite."""
    tensor = checked(name, weights, None, *FLOATS)
    value = float(tensor.flatten()[0]) if tensor.numel() == 1 else 0.0
    if not 0 < value < float("inf"):
        raise CheckpointError(f"Tensor {name} is to hold one positive number.")
    return value
