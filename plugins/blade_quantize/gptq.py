"""GPTQ (Frantar et al. 2023): columns are rounded one after the other, and those to come make up for the error.

The most important columns, by the Hessian's diagonal, come first ("act-order"); every group's scale is fixed before,
from the weights as they are, so that groups stay where they are and no reader has to know of the order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.nn import in_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade_quantize.grids import Grid

ROWS = 512  # that one thread of a CPU works on: of more, blocks would leave its cache
BLOCK = 128  # columns whose errors are handed on to the rest together
DAMPING = 0.01  # of the mean of the diagonal, added to it


def gptq(w: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """The codes of w [N, K], scales and zeros [N, G], such that ||X (W - W')^T|| is small, hessian = X^T X [K, K]. All
    is float32."""
    group = w.shape[1] // scales.shape[1]
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_factor(hessian[order][:, order])
    groups = torch.div(order, group, rounding_mode="floor").tolist()
    back = order.argsort()
    codes = torch.empty_like(w)

    def work(w: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        columns = w.T[order].contiguous()  # [K, rows]: a column's numbers lie together
        codes.copy_(solve(columns, factor, scales.T.contiguous(), zeros.T.contiguous(), groups, grid)[back].T)

    in_chunks(work, ROWS if w.device.type == "cpu" else len(w), w, codes, scales, zeros)
    return codes


def solve(columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Seq[int], grid: Grid) -> Tensor:
    """The codes of columns [K, N], which are changed; scales and zeros [G, N], of which column i has groups[i]."""
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            scale, zero = scales[groups[i]], zeros[groups[i]]
            codes[i] = grid.round(columns[i], scale, zero)
            error = torch.sub(columns[i], (codes[i] - zero).mul_(scale), out=errors[i - start])
            error /= factor[i, i]
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = hessian^-1, [K, K].

    Read backwards, the Hessian's Cholesky factor is an upper triangular R with R R^T = hessian; so U = R^-1, and the
    inverse itself is never needed. The diagonal is damped, more and more until the factor exists; a channel that was
    never active gets a diagonal of its own.
    """
    diagonal = hessian.diagonal().clone()
    mean = diagonal.mean().clamp(min=1e-10)
    idle = (diagonal == 0).float() * mean
    damping = DAMPING
    while True:
        damped = hessian + torch.diag(idle + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        damping *= 10
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return factor
