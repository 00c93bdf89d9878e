"""Packed linears: dense (bf16, f32) and quantised (quantized.py), one alone or several side by side."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from blade_native.simd.check import DTYPES, check
from blade_native.simd.library import CFormat, CLinear, Library

BITS = {torch.float32: 32, torch.bfloat16: 16}
PANEL = 32  # output channels per panel

T = TypeVar("T")


class Matrix(NamedTuple, Generic[T]):
    """One of several to be stacked along N: what its weights are made of, and what they become."""

    source: T
    form: CFormat
    shape: tuple[int, int]  # N and K
    order: Tensor | None = None  # [K] int32: of the columns, as GroupedWeight.order

    def continues(self, other: Matrix[T]) -> bool:
        """Whether the two can be one matrix, this below the other."""
        if self.order is None or other.order is None:
            same_order = self.order is other.order
        else:
            same_order = self.order.equal(other.order)
        return same_order and other.shape[0] % PANEL == 0 and bytes(other.form) == bytes(self.form)


class PackedLinear:
    """y = x W^T + b over weights packed for one machine: contracts.Linear.

    A row of the result is bit-identical whatever rows are computed with it. `dtype` is that of x for dense weights,
    None for quantised ones, which take f32 and bf16: 8-bit floats as they are, the others quantise each group of a row
    to int8 (the scheme of LLM.int8()'s vector-wise quantisation, Dettmers et al. 2022, in groups). b is float32, padded
    to whole panels; `order` that of the weights' columns, int32.
    """

    def __init__(
        self,
        library: Library,
        linear: CLinear,
        dtype: torch.dtype | None,
        weights: Tensor,
        bias: Tensor | None,
        threads: int,
        k: int | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.n: int = linear.n
        self.k: int = k or linear.k  # features of x; the weights may have a column more
        self.dtype = dtype
        self.weights, self.bias, self.order = weights, bias, order  # kept alive for the kernels
        self._library, self._linear, self._threads = library, linear, threads
        self.address = ctypes.addressof(linear)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, or in `out_dtype`: float32 logits come without a second pass."""
        y = x.new_empty((*x.shape[:-1], self.n), dtype=out_dtype)
        self.write(x, y.view(-1, self.n))
        return y

    def write(self, x: Tensor, y: Tensor) -> None:
        """x [..., K] into y [rows of x, N], f32 or bf16, whose rows may lie apart: a slice of a wider one will do."""
        dtype = x.dtype
        if dtype is not self.dtype and (self.dtype is not None or dtype not in DTYPES):
            raise TypeError(f"x is {dtype}, the weights want {self.dtype or 'float32 or bfloat16'}")
        if x.shape[-1] != self.k:
            raise ValueError(f"x has {x.shape[-1]} features, the weights want {self.k}")
        if not x.is_contiguous():
            raise ValueError("x is not contiguous")
        m = x.numel() // self.k
        if y.shape != (m, self.n) or (self.n > 1 and y.stride(1) != 1):
            raise ValueError(f"y has shape {list(y.shape)} and strides {y.stride()}, not whole rows [{m}, {self.n}]")
        if self._linear.k != self.k:
            x = F.pad(x, (0, self._linear.k - self.k))
        out = y.data_ptr(), DTYPES[y.dtype], y.stride(0)
        self._library.linear(self.address, x.data_ptr(), DTYPES[dtype], m, *out, self._threads)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of W, read back and dequantised: ids [T] int64 -> [T, K]. Ids are trusted to be in range."""
        check("ids", ids, torch.int64, (ids.numel(),))
        if dtype is not (self.dtype or dtype) or dtype not in DTYPES:
            raise TypeError(f"rows in {dtype}: the weights give {self.dtype or 'float32 or bfloat16'}")
        out = torch.empty(ids.numel(), self._linear.k, dtype=dtype)
        into = out.data_ptr(), DTYPES[out.dtype]
        self._library.unpack_rows(self.address, ids.data_ptr(), len(out), *into, self._threads)
        return out[:, : self.k]


class StackedLinear:
    """Linears over one x, their outputs side by side: contracts.Linear. Parts may differ in format."""

    def __init__(self, parts: Seq[PackedLinear]) -> None:
        self.parts = parts
        self.n = sum(part.n for part in parts)
        self.k = parts[0].k

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K] -> [..., N], N that of all parts together, in x's dtype or in `out_dtype`."""
        y = x.new_empty((*x.shape[:-1], self.n), dtype=out_dtype)
        columns = y.view(-1, self.n).split_with_sizes([part.n for part in self.parts], dim=1)
        for part, into in zip(self.parts, columns, strict=True):
            part.write(x, into)
        return y


def pack_dense(library: Library, weight: Tensor, bias: Tensor | None, threads: int) -> PackedLinear:
    """weight [N, K] bf16 or f32; any N and K."""
    if weight.dtype not in BITS:
        raise TypeError(f"weight is {weight.dtype}, not float32 or bfloat16")
    dtype, (n, k) = weight.dtype, weight.shape
    if dtype is torch.bfloat16 and k % 2:
        weight = F.pad(weight, (0, 1))  # whole 32-bit words
    bias, weight = pad_bias(bias), weight.contiguous()
    linear = CLinear(CFormat(BITS[dtype]), n, weight.shape[1], None, address(bias))
    weights = place(library, linear)
    library.pack_dense(ctypes.byref(linear), weight.data_ptr(), threads)
    return PackedLinear(library, linear, dtype, weights, bias, threads, k)


def pack_joined(
    library: Library,
    matrices: Seq[Matrix[T]],
    bias: Tensor | None,
    threads: int,
    pack: Callable[[CLinear, T], None],
) -> PackedLinear | StackedLinear:
    """One linear over grouped matrices stacked along N; pack(linear, source) fills one's weights. Neighbours of one
    format and order become one matrix, unless one ends inside a panel."""
    runs: list[list[Matrix[T]]] = []
    for each in matrices:
        if runs and each.continues(runs[-1][-1]):
            runs[-1].append(each)
        else:
            runs.append([each])
    sizes = [sum(each.shape[0] for each in run) for run in runs]
    biases = [None] * len(runs) if bias is None else bias.split_with_sizes(sizes)
    parts = [_pack_run(library, *part, threads, pack) for part in zip(runs, biases, strict=True)]
    return parts[0] if len(parts) == 1 else StackedLinear(parts)


def _pack_run(
    library: Library,
    run: Seq[Matrix[T]],
    bias: Tensor | None,
    threads: int,
    pack: Callable[[CLinear, T], None],
) -> PackedLinear:
    """One matrix out of several of one format, of which all but the last fill whole panels."""
    _, form, (_, k), order = run[0]
    bias = pad_bias(bias)
    linear = CLinear(form, sum(each.shape[0] for each in run), k, None, address(bias), address(order))
    weights = place(library, linear)
    at = weights.data_ptr()
    for each in run:
        part = CLinear(form, each.shape[0], k, at)
        pack(part, each.source)
        at += library.packed_bytes(ctypes.byref(part))
    return PackedLinear(library, linear, None, weights, bias, threads, order=order)


def place(library: Library, linear: CLinear) -> Tensor:
    """Memory for the packed weights, to which `linear` then points."""
    weights = library.regions.allocate(library.packed_bytes(ctypes.byref(linear)))
    linear.weights = weights.data_ptr()
    return weights


def pad_bias(bias: Tensor | None) -> Tensor | None:
    """[N] -> float32 in whole panels."""
    return None if bias is None else F.pad(bias.float(), (0, -len(bias) % PANEL))


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
