"""Rounding a stack of linears as its activations pass by, and where the result goes."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

import torch

from blade.nn.packing import GROUPS
from blade_quantize import grids
from blade_quantize.activations import rounding
from blade_quantize.gptq import gptq
from blade_quantize.layout import stored
from blade_quantize.smoothing import Smoother

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from blade.contracts import OpenedModel
    from blade_quantize.scheme import Scheme
    from blade_quantize.shards import ShardWriter
    from blade_quantize.stack import Stack

DECIDERS = {
    "gate", "router", "shared_expert_gate", "in_proj_ba", "in_proj_a", "in_proj_b", "block_inject_weight",
    "index_qk_proj",
}  # fmt: skip
"""Matrices that are small and decide much: they stay plain."""
KERNEL_GROUP = GROUPS[-1]  # the least of integers: rows with one scale that do not divide so would be served plain


def stays_plain(stack: Stack, scheme: Scheme) -> str | None:
    """Why; None where it is to be rounded. A stack is one thing or the other, as servers want it."""
    for prefix in stack.prefixes:
        if any(fnmatch.fnmatchcase(prefix, pattern) for pattern in scheme.ignore):
            return "as --ignore says"
        if prefix.rpartition(".")[2] in DECIDERS:
            return "for it is small and decides much"
    group = scheme.group or (1 if scheme.kind == "fp8" else KERNEL_GROUP)
    if stack.width % group:
        return f"for rows of {stack.width} numbers do not divide into groups of {group}"
    return None


class Rounder:
    """Rounds one stack after the other, and puts the tensors that stand for it. Scales come last: a later stack may
    change them."""

    def __init__(self, scheme: Scheme, opened: OpenedModel, scale_dtype: torch.dtype) -> None:
        self.scheme = scheme
        self.activations = rounding(scheme)
        self.put: Callable[[str, Tensor], None] = _nowhere
        self.uncalibrated: list[str] = []  # modules that no activation came by
        self._dtype = scale_dtype
        self._grid = grids.make_grid(scheme, scale_dtype)
        self._scales: dict[str, Tensor] = {}
        self.smoother = None
        if scheme.smooths:
            self.smoother = Smoother(scheme, opened.model_config, opened.weights, self._grid)

    def __call__(self, stack: Stack, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight [N, K] float32 that the stack has from now on, and what x [T, K] is to be divided by."""
        w = stack.weight()
        calibrated = self.scheme.calibrated and x is not None and len(x) > 0
        if self.scheme.calibrated and not calibrated:
            self.uncalibrated += stack.prefixes
        x = x.float() if calibrated and x is not None else None
        smooth = self.smoother(stack.prefixes, w, x) if self.smoother and x is not None else None
        if smooth is not None and x is not None:
            w, x = w * smooth, x / smooth
        codes, scales, zeros = self._round(w, x)
        self._put(stack, codes, scales, zeros)
        return grids.values(codes, scales, zeros), smooth

    def finish(self, writer: ShardWriter) -> dict[str, Tensor]:
        """Put the scales; the factors [N] of other modules are given back."""
        factors = dict(self.smoother.factors) if self.smoother else {}
        for prefix, scales in self._scales.items():
            factor = factors.get(prefix)
            scales = scales if factor is None else scales * factor[:, None].cpu()
            writer.put(f"{prefix}.weight_scale", scales.to(self._dtype))
        return factors

    def _round(self, w: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [N, K]; scales and zeros [N, G]."""
        group = self.scheme.group or w.shape[1]
        if x is None or not self.scheme.solves:
            importance = x.square().sum(0) if x is not None and self.scheme.algo == "awq" else None
            scales, zeros = grids.fit(w, group, self._grid, importance)
            return grids.round_matrix(w, scales, zeros, self._grid), scales, zeros
        hessian = x.T @ x
        scales, zeros = grids.fit(w, group, self._grid, hessian.diagonal())
        return gptq(w, hessian, scales, zeros, self._grid), scales, zeros

    def _put(self, stack: Stack, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        sizes = [n for n, _ in stack.shapes]
        parts = zip(stack.prefixes, *(each.split_with_sizes(sizes) for each in (codes, scales, zeros)), strict=True)
        for prefix, part, scale, zero in parts:
            self._scales[prefix] = scale.cpu()
            for end, tensor in stored(self.scheme, part, zero).items():
                self.put(f"{prefix}.{end}", tensor)


def _nowhere(name: str, tensor: Tensor) -> None:
    raise RuntimeError(f"{name} is rounded before there is a file for it")


class RoundingLinear:
    """contracts.Linear that holds no weight: its first call decides what that will be."""

    def __init__(self, stack: Stack, rounder: Rounder, done: Callable[[], None]) -> None:
        self.stack, self._rounder, self._done = stack, rounder, done
        self.called = False

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        weight, smooth = self._rounder(self.stack, x)
        self.called = True
        self._done()
        x = x if smooth is None else x / smooth
        rounded = self._rounder.activations
        return self.stack.apply(rounded(x) if rounded else x, weight).to(out_dtype or x.dtype)

    def finish(self) -> None:
        """Round it by its weight alone, if it was never called."""
        if not self.called:
            self._rounder(self.stack, None)
            self._done()
