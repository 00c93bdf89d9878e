"""Weights of 8-bit floats for the packed linears: one byte each in memory, floats where they are multiplied.

e4m3 is a float16, and a float32, but for the bias of its exponent: shifted into place, a byte is its value times a
power of two, which the scale makes good. NaN, for which that does not hold, becomes that of its group's scale: the
output is NaN in any case.
"""

from __future__ import annotations

import ctypes
import math

import torch

from blade import Float8Weight, QuantizedWeight
from blade_native.simd.grouped import FLOATS
from blade_native.simd.library import CFloat8, CFormat, CLinear, Library
from blade_native.simd.linear import Matrix

MAX_GROUP = 128  # numbers of a row for which the scale is read once
MIN_GROUP = 16
MAX_SCALE = 2.0**7  # a bound with room: times what it makes good it must be a float32
CODING = 2  # `Coding` of api.h


def has_kernel(weight: Float8Weight) -> bool:
    """Whether kernels compute on such weights, if they are sound: not where scales change too often along a row, or may
    overflow in what they make good."""
    return _group(weight) >= MIN_GROUP and bool((weight.scales < MAX_SCALE).all())


def problem(weight: Float8Weight) -> str | None:
    """What is not as it should be, beginning with the field's name."""
    if weight.q.dtype is not torch.float8_e4m3fn or weight.q.dim() != 2:
        return f"q is {weight.q.dtype} {list(weight.q.shape)}, not torch.float8_e4m3fn [N, K]"
    if min(weight.block) < 1:
        return f"block is {weight.block}, not numbers of rows and columns"
    shape = tuple(-(-size // block) for size, block in zip(weight.q.shape, weight.block, strict=True))
    if weight.scales.dtype is not torch.float32 or weight.scales.shape != shape:
        return f"scales are {weight.scales.dtype} {list(weight.scales.shape)}, not torch.float32 {list(shape)}"
    return None


def matrix_of(weight: Float8Weight) -> Matrix[QuantizedWeight]:
    n, k = weight.q.shape
    form = CFormat(8, _group(weight), FLOATS[torch.float32])
    form.coding = CODING
    return Matrix(weight, form, (n, k))


def fill(library: Library, linear: CLinear, weight: Float8Weight, threads: int) -> None:
    """Put the weights of a sound matrix where the linear has room for them."""
    q, scales = weight.q.contiguous(), weight.scales.contiguous()
    pointers = CFloat8(q.data_ptr(), scales.data_ptr(), *weight.block)
    library.pack_float8(ctypes.byref(linear), ctypes.byref(pointers), threads)


def _group(weight: Float8Weight) -> int:
    """No group straddles two blocks."""
    columns = weight.block[1]
    return MAX_GROUP if columns >= weight.q.shape[1] else math.gcd(columns, MAX_GROUP)
