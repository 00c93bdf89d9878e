"""Activations as a server rounds them: each token by a scale of its own, found when it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade_quantize.grids import FP8_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from blade_quantize.scheme import Scheme


def rounding(scheme: Scheme) -> Callable[[Tensor], Tensor] | None:
    """x [T, K] -> what it is rounded to; None: as it is."""
    if not scheme.activations:
        return None
    return round_fp8 if scheme.kind == "fp8" else round_int8


def round_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-10)
    return (x / scale).round_().mul_(scale)


def round_fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).div_(FP8_MAX).clamp_(min=1e-10)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype).mul_(scale)
