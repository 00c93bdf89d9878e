"""Rounding plain weights to 8, 6 and 4 bits while a model is loaded."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from blade import GroupedWeight
from blade_native.simd.library import CRounding, Library, check_status

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}  # `Dtype` of api.h
GROUPS = (32, 64, 128)


def round_weight(library: Library, weight: Tensor, bits: int, group: int, threads: int) -> GroupedWeight | None:
    """As contracts.Ops. Raises MemoryError where there is no room for the work."""
    if weight.dtype not in DTYPES or weight.dim() != 2 or group not in GROUPS or bits not in (4, 6, 8):
        return None
    (n, k), weight = weight.shape, weight.contiguous()
    if k % group:
        raise ValueError(f"group of {group} does not divide K = {k}")
    q = torch.empty(n, k, dtype=torch.uint8)
    scales, minima = torch.empty(2, n, k // group, dtype=torch.uint8 if bits == 4 else torch.float16)
    block_scales, block_minima = torch.empty(2, n, 1, dtype=torch.float16)
    block = _block(k, group)
    units = torch.empty(n, k // block, dtype=torch.float16)
    tensors = q, scales, minima, block_scales, block_minima, units
    pointers = (tensor.data_ptr() for tensor in tensors)
    rounding = CRounding(weight.data_ptr(), DTYPES[weight.dtype], bits, group, n, k, *pointers, block)
    check_status(library.round(ctypes.byref(rounding), threads))
    if bits > 4:
        return GroupedWeight(bits, group, q, scales)
    if rounding.nested:
        block_scales, block_minima = units, -units
    return GroupedWeight(4, group, q, scales, minima, block_scales=block_scales, block_minima=block_minima)


def _block(k: int, group: int) -> int:
    """Numbers that share a unit where they are nested: whole groups, up to 128, that divide a row."""
    block = group
    while block < GROUPS[-1] and k % (2 * block) == 0:
        block *= 2
    return block
