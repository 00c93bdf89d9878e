"""How far from exact a result may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blade.testing.require import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that a result in this dtype may have; twice its resolution, and 1e-5 for sums in float32."""
    import torch

    return max(2 * torch.finfo(dtype).eps, 1e-5)


def require_close(what: str, found: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """`expected` is float32; errors are measured against its largest value."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    require(found.dtype == dtype, f"{what}: dtype {found.dtype}, not {dtype}")
    error = float((found.float().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    limit = factor * tolerance(dtype)
    require(
        error <= limit, f"{what}, {dtype}, shape {tuple(found.shape)}: relative error {error:.1e} exceeds {limit:.1e}"
    )
