"""Integers of 2 to 8 bits: packed along K into words of 32 bits, offset by half their range, or as int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade import CheckpointError
from blade.nn.packing import (
    checked,
    checked_scales,
    grouped,
    grouped_matrix,
    kept_group,
    matrix_shape,
    order_of,
    regroup,
    unpack,
)
from blade_compressed_tensors.schemes import PACKED, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from blade import GroupedWeight
    from blade.contracts import Weights
    from blade.nn import Matrix


def integer_matrix(prefix: str, weights: Weights, scheme: Scheme) -> Matrix:
    """By the headers, and the shape that is beside packed integers."""
    _, n, k = _shape(prefix, weights, scheme)
    return grouped_matrix(n, k, _bits(scheme), _group(scheme, k), zeros=not scheme.symmetric)


def integer_weight(prefix: str, weights: Weights, scheme: Scheme) -> GroupedWeight:
    """weight_packed [N, K bits / 32] int32 or weight [N, K] int8; weight_scale [N, groups], [N, 1] or [1];
    weight_zero_point packed along N, or int8; maybe weight_g_idx [K]."""
    name, n, k = _shape(prefix, weights, scheme)
    bits, group = _bits(scheme), _group(scheme, k)
    num_groups = -(-k // group)
    if scheme.format in PACKED:
        q = unpack(checked(name, weights, (n, -(-k * bits // 32)), torch.int32), bits, k)
    else:
        q = _unsigned(checked(name, weights, (n, k), torch.int8))
    whole = scheme.extent == "tensor"
    scales = checked_scales(f"{prefix}.weight_scale", weights, None if whole else (n, num_groups))
    if whole and scales.numel() != 1:
        raise CheckpointError(f"Tensor {prefix}.weight_scale has shape {tuple(scales.shape)}, not one number.")
    zeros = None if scheme.symmetric else _zeros(f"{prefix}.weight_zero_point", weights, bits, n, num_groups)
    order = order_of(f"{prefix}.weight_g_idx", weights, k, group)
    if order is not None:
        q = q[:, order]
    kept = kept_group(k, group)
    if zeros is not None:
        zeros = regroup(zeros, k, group, kept)
    return grouped(q, bits, kept, regroup(scales.expand(n, num_groups), k, group, kept), zeros, order)


def _shape(prefix: str, weights: Weights, scheme: Scheme) -> tuple[str, int, int]:
    """The tensor's name, N and K."""
    if scheme.format not in PACKED:
        name = f"{prefix}.weight"
        return name, *matrix_shape(name, weights)
    name, beside = f"{prefix}.weight_packed", f"{prefix}.weight_shape"
    n, words = matrix_shape(name, weights)
    rows, k = checked(beside, weights, (2,), torch.int64, torch.int32).tolist()
    if rows != n or k < 1 or -(-k * scheme.bits // 32) != words:
        raise CheckpointError(
            f"Tensor {beside} says ({rows}, {k}); {name} is of ({n}, {words}) words of {32 // scheme.bits} numbers."
        )
    return name, n, k


def _bits(scheme: Scheme) -> int:
    """Those in an int8 are taken for 8, however few are used."""
    return scheme.bits if scheme.format in PACKED else 8


def _group(scheme: Scheme, k: int) -> int:
    if scheme.extent not in ("tensor", "channel", "group"):
        raise CheckpointError(
            f"config.json: integers in {scheme.extent}s are not served.", "Use the model's unquantised form."
        )
    return min(scheme.group, k) if scheme.extent == "group" else k


def _zeros(name: str, weights: Weights, bits: int, n: int, num_groups: int) -> Tensor:
    """[N, groups] uint8."""
    stored = checked(name, weights, None, torch.int32, torch.int8)
    if stored.dtype == torch.int32 and tuple(stored.shape) == (-(-n * bits // 32), num_groups):
        return unpack(stored.T, bits, n).T.contiguous()
    if stored.dtype == torch.int8 and tuple(stored.shape) == (n, num_groups):
        zeros: Tensor = _unsigned(stored) - (128 - 2 ** (bits - 1))
        return zeros
    raise CheckpointError(
        f"Tensor {name} has shape {tuple(stored.shape)}; to those beside it belongs {(n, num_groups)}."
    )


def _unsigned(x: Tensor) -> Tensor:
    """int8 -> uint8, with 128 for 0."""
    unsigned: Tensor = x.contiguous().view(torch.uint8) ^ 128
    return unsigned
