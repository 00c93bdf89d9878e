"""Mixtures of experts over packed linears: all experts of a layer in one kernel call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from blade.contracts import Linear
from blade_native.simd.check import DTYPES, check
from blade_native.simd.library import Library
from blade_native.simd.linear import PackedLinear


class PackedExperts:
    """contracts.Experts. What lies between x and the result is float32."""

    def __init__(self, library: Library, gate_up: Seq[PackedLinear], down: Seq[PackedLinear], threads: int) -> None:
        self.gate_up, self.down = gate_up, down
        self.d, self.inner = gate_up[0].k, down[0].k
        self.dtypes = {linear.dtype for linear in (*gate_up, *down)} - {None}  # x's has to be all of them
        self._library, self._threads = library, threads
        self._matrices = tuple(_addresses(linears) for linears in (gate_up, down))
        self._fixed = *map(ctypes.addressof, self._matrices), len(gate_up), self.d, self.inner

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, weigh_input: bool = False) -> Tensor:
        """Raises IndexError where an id is none of an expert."""
        if x.dtype not in DTYPES or self.dtypes - {x.dtype}:
            raise TypeError(f"x is {x.dtype}, the weights want {self.dtypes or 'float32 or bfloat16'}")
        m, k = ids.shape
        if k == 0:
            raise ValueError("ids: a token needs an expert")
        check("x", x, x.dtype, (m, self.d))
        check("ids", ids, torch.int64, (m, k))
        check("weights", weights, torch.float32, (m, k))
        y = torch.empty_like(x)
        tensors = DTYPES[x.dtype], x.data_ptr(), m, k, ids.data_ptr(), weights.data_ptr(), y.data_ptr()
        self._library.experts(*self._fixed, *tensors, weigh_input, self._threads)
        return y


def packed_experts(library: Library, gate_up: Seq[Linear], down: Seq[Linear], threads: int) -> PackedExperts | None:
    """None where one of them is something else than one packed matrix."""
    first, second = ([x for x in linears if isinstance(x, PackedLinear)] for linears in (gate_up, down))
    if not gate_up or len(first) != len(gate_up) or len(second) != len(down):
        return None
    d, inner = first[0].k, second[0].k
    wrong = [x for x in first if (x.n, x.k) != (2 * inner, d)] + [x for x in second if (x.n, x.k) != (d, inner)]
    if wrong or len(first) != len(second):
        raise ValueError(f"experts: {len(first)} of [{2 * inner}, {d}] and {len(second)} of [{d}, {inner}], or others")
    return PackedExperts(library, first, second, threads)


def _addresses(linears: Seq[PackedLinear]) -> Any:
    return (ctypes.c_void_p * len(linears))(*(linear.address for linear in linears))
