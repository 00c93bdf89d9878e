"""What the kernels take for granted, checked where Python hands over. A check that passes costs half a microsecond."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # `Dtype` of api.h


def check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise TypeError for another dtype, ValueError for another shape or a strided tensor."""
    if x.dtype is not dtype or x.shape != shape:
        raise _refusal(name, x, dtype, shape)
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def check_heads(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """As check for [T, H, D], where tokens may lie apart: a slice of a fused projection will do."""
    if x.dtype is not dtype or x.shape != shape:
        raise _refusal(name, x, dtype, shape)
    if not x.is_contiguous() and not (x.stride(2) == 1 and (x.stride(1) == shape[2] or shape[1] == 1)):
        raise ValueError(f"{name}: the heads of a token do not lie side by side")


def check_rows(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As check for [N, D], where rows may lie apart."""
    if x.dtype is not dtype or x.shape != shape:
        raise _refusal(name, x, dtype, shape)
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"{name}: the numbers of a row do not lie side by side")


def _refusal(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> TypeError | ValueError:
    if x.dtype is not dtype:
        return TypeError(f"{name} is {x.dtype}, not {dtype}")
    return ValueError(f"{name} has shape {list(x.shape)}, not {list(shape)}")
