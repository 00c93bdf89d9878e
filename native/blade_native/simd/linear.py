"""Packed linears: dense (bf16, f32) and quantised in groups (int8, int4)."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from blade_native.simd.check import DTYPES, check
from blade_native.simd.library import CLinear, Library
from blade_native.simd.memory import allocate

DENSE = {torch.float32: 0, torch.bfloat16: 1}  # `Kind` of api.h
GROUPED = {8: 2, 4: 3}  # bits -> `Kind`
GROUP = {8: 64, 4: 32}  # bits -> weights that share a scale
PANEL = 32  # output channels per panel


class PackedLinear:
    """y = x W^T + b over weights packed for one machine: contracts.Linear.

    A row of the result is bit-identical whatever rows are computed with it. `dtype` is that of x for dense weights,
    None for grouped ones, which take f32 and bf16 and quantise each group of a row to int8 (the scheme of LLM.int8()'s
    vector-wise quantisation, Dettmers et al. 2022, in groups). `weights` are packed from [n, k], b is float32.
    """

    def __init__(
        self, library: Library, kind: int, shape: tuple[int, int], weights: Tensor, bias: Tensor | None, threads: int
    ) -> None:
        self.n, self.k = shape
        self.dtype = next((dtype for dtype, dense in DENSE.items() if dense == kind), None)
        self.weights = weights
        self.bias = None if bias is None else F.pad(bias.float(), (0, -self.n % PANEL))
        self._library, self._threads = library, threads
        self._padded_k = padded(self.k, self.dtype)
        bias_at = None if self.bias is None else self.bias.data_ptr()
        self._struct = CLinear(kind, self.n, self._padded_k, weights.data_ptr(), bias_at)
        self._address = ctypes.addressof(self._struct)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, or in `out_dtype`: float32 logits come without a second pass."""
        dtype = x.dtype
        if dtype is not self.dtype and (self.dtype is not None or dtype not in DTYPES):
            raise TypeError(f"x is {dtype}, the weights want {self.dtype or 'float32 or bfloat16'}")
        if x.shape[-1] != self.k:
            raise ValueError(f"x has {x.shape[-1]} features, the weights want {self.k}")
        if not x.is_contiguous():
            raise ValueError("x is not contiguous")
        y = x.new_empty((*x.shape[:-1], self.n), dtype=out_dtype)
        if self._padded_k != self.k:
            x = F.pad(x, (0, self._padded_k - self.k))
        num_rows = x.numel() // self._padded_k
        if num_rows:
            out = y.data_ptr(), DTYPES[y.dtype], self.n
            self._library.linear(self._address, x.data_ptr(), DTYPES[dtype], num_rows, *out, self._threads)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a dense W, read back: ids [T] int64 -> [T, K]. Ids are trusted to be in range."""
        if self.dtype is None:
            raise TypeError("rows of quantised weights cannot be read back")
        check("ids", ids, torch.int64, (ids.numel(),))
        out = torch.empty(ids.numel(), self._padded_k, dtype=self.dtype)
        self._library.unpack_rows(self._address, ids.data_ptr(), ids.numel(), out.data_ptr(), self._threads)
        return out[:, : self.k]


def padded(k: int, dtype: torch.dtype | None) -> int:
    """K in whole 32-bit words: an odd K in bf16 gets a column of zeros."""
    return k + k % 2 if dtype is torch.bfloat16 else k


def pack_dense(library: Library, weight: Tensor, bias: Tensor | None, threads: int) -> PackedLinear:
    """weight [N, K] bf16 or f32; any N and K."""
    if weight.dtype not in DENSE:
        raise TypeError(f"weight is {weight.dtype}, not float32 or bfloat16")
    kind, (n, k) = DENSE[weight.dtype], weight.shape
    if padded(k, weight.dtype) != k:
        weight = F.pad(weight, (0, 1))
    return PackedLinear(library, kind, (n, k), _pack(library, kind, weight, threads), bias, threads)


def quantize(library: Library, weight: Tensor, bias: Tensor | None, bits: int, threads: int) -> PackedLinear:
    """Round weight [N, K] (bf16 or f32) to the nearest of 8 bits in groups of 64 or 4 bits in groups of 32 of K.

    8 bits are symmetric, 4 bits have a minimum per group; scales and minima are halves. Raises ValueError where K is
    not a multiple of the group.
    """
    n, k = weight.shape
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight is {weight.dtype}, not float32 or bfloat16")
    if k % GROUP[bits]:
        raise ValueError(f"{bits}-bit groups of {GROUP[bits]} do not divide K = {k}")
    packed = _pack(library, GROUPED[bits], weight, threads)
    return PackedLinear(library, GROUPED[bits], (n, k), packed, bias, threads)


def _pack(library: Library, kind: int, weight: Tensor, threads: int) -> Tensor:
    n, k = weight.shape
    weight = weight.contiguous()
    packed = allocate(library.packed_bytes(kind, n, k))
    library.pack(kind, weight.data_ptr(), DTYPES[weight.dtype], n, k, packed.data_ptr(), threads)
    return packed


def pack_quants(
    library: Library, q: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None, threads: int
) -> PackedLinear:
    """Repack quantised weights without loss: 8 bits without `minima`, 4 bits with.

    q [N, K] uint8: w = scale * (q - 128) in groups of 64 of K, or w = scale * q + minimum with q in 0..15 in groups of
    32, which holds GGUF's Q4_0 (minimum = -8 scale) and Q4_1. scales and minima [N, K / group] float16.
    """
    bits = 8 if minima is None else 4
    n, k = q.shape
    if k % GROUP[bits]:
        raise ValueError(f"{bits}-bit groups of {GROUP[bits]} do not divide K = {k}")
    check("q", q, torch.uint8, (n, k))
    check("scales", scales, torch.float16, (n, k // GROUP[bits]))
    if minima is not None:
        check("minima", minima, torch.float16, (n, k // GROUP[bits]))
    packed = allocate(library.packed_bytes(GROUPED[bits], n, k))
    least = None if minima is None else minima.data_ptr()
    library.pack_quants(GROUPED[bits], q.data_ptr(), scales.data_ptr(), least, n, k, packed.data_ptr(), threads)
    return PackedLinear(library, GROUPED[bits], (n, k), packed, bias, threads)
