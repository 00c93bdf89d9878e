"""Rounding plain weights to 8 and to 4 bits while a model is loaded."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from blade import GroupedWeight
from blade_native.simd.library import CRounding, Library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}  # `Dtype` of api.h
GROUPS = (32, 64, 128)


def round_weight(library: Library, weight: Tensor, bits: int, group: int, threads: int) -> GroupedWeight | None:
    """As contracts.Ops."""
    if weight.dtype not in DTYPES or weight.dim() != 2 or group not in GROUPS or bits not in (4, 8):
        return None
    (n, k), weight = weight.shape, weight.contiguous()
    if k % group:
        raise ValueError(f"group of {group} does not divide K = {k}")
    form = _empty_8(n, k, group) if bits == 8 else _empty_4(n, k, group)
    tensors = form.q, form.scales, form.minima, form.block_scales, form.block_minima
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    rounding = CRounding(weight.data_ptr(), DTYPES[weight.dtype], bits, group, n, k, *pointers)
    library.round(ctypes.byref(rounding), threads)
    return form


def _empty_8(n: int, k: int, group: int) -> GroupedWeight:
    return GroupedWeight(
        8, group, torch.empty(n, k, dtype=torch.uint8), torch.empty(n, k // group, dtype=torch.float16)
    )


def _empty_4(n: int, k: int, group: int) -> GroupedWeight:
    scales, minima = torch.empty(2, n, k // group, dtype=torch.uint8)
    block_scales, block_minima = torch.empty(2, n, 1, dtype=torch.float16)
    q = torch.empty(n, k, dtype=torch.uint8)
    return GroupedWeight(4, group, q, scales, minima, block_scales=block_scales, block_minima=block_minima)
