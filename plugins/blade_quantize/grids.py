"""The numbers that a weight can be rounded to, and the scale of a group of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from blade.nn import in_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from blade_quantize.scheme import Scheme

FP8_MAX = 448.0  # of float8_e4m3fn
CHUNK = 1 << 17  # numbers that go through all operations together: on a CPU they stay in cache
CHUNK_ELSEWHERE = 1 << 26
SHARES = tuple(share / 20 for share in range(20, 11, -1))  # of a group's range, tried where activations weigh errors


class Grid(Protocol):
    """w is rounded to scale * (code - zero). Everything here is float32."""

    def fit(self, w: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Scale and zero, [..., 1] each, of the numbers w [..., n], such that `share` of their range is covered. The
        scale is one that can be stored."""
        ...

    def round(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The codes of w."""
        ...


@dataclass(frozen=True, slots=True)
class IntGrid:
    """Integers of `bits` bits, -2^(bits - 1) the lowest."""

    bits: int
    symmetric: bool
    dtype: torch.dtype  # of scales in the checkpoint

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def steps(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, w: Tensor, share: float) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            scale = _stored(w.abs().amax(-1, keepdim=True) * (2 * share / self.steps), self.dtype)
            return scale, torch.zeros_like(scale)
        top, bottom = (w.amax(-1, keepdim=True).clamp(min=0) * share, w.amin(-1, keepdim=True).clamp(max=0) * share)
        scale = _stored((top - bottom) / self.steps, self.dtype)
        zero = (self.low - bottom / scale).round_().clamp_(self.low, self.low + self.steps)
        return scale, zero

    def round(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (w / scale).add_(zero).round_().clamp_(self.low, self.low + self.steps)


@dataclass(frozen=True, slots=True)
class Float8Grid:
    """The numbers of float8_e4m3fn (Micikevicius et al. 2022)."""

    dtype: torch.dtype  # of scales in the checkpoint

    def fit(self, w: Tensor, share: float) -> tuple[Tensor, Tensor]:
        scale = _stored(w.abs().amax(-1, keepdim=True) * (share / FP8_MAX), self.dtype)
        return scale, torch.zeros_like(scale)

    def round(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (w / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it comes back from the checkpoint; 1 where all numbers are 0."""
    stored = scale.to(dtype).float()
    return stored.masked_fill_(stored == 0, 1.0)


def make_grid(scheme: Scheme, dtype: torch.dtype) -> Grid:
    """`dtype`: of scales in the checkpoint."""
    return Float8Grid(dtype) if scheme.kind == "fp8" else IntGrid(scheme.bits, scheme.symmetric, dtype)


def fit(w: Tensor, group: int, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zeros, [N, K / group] each, of w [N, K]: those that cover each group's whole range, or with
    `importance` [K] those of SHARES under which the squared errors, so weighted, are least."""
    n, k = w.shape
    scales, zeros = w.new_empty(2, n, k // group)
    weights = None if importance is None else importance.view(-1, group)

    def work(w: Tensor, scales: Tensor, zeros: Tensor) -> None:
        scale, zero = _best(w.view(len(w), -1, group), grid, weights)
        scales.copy_(scale.squeeze(2))
        zeros.copy_(zero.squeeze(2))

    in_chunks(work, _num_rows(w), w, scales, zeros)
    return scales, zeros


def _best(w: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """w [R, G, group], importance [G, group] -> [R, G, 1] each."""
    scale, zero = grid.fit(w, 1.0)
    if importance is None:
        return scale, zero
    least = _error(w, scale, zero, grid, importance)
    for share in SHARES[1:]:
        tried = grid.fit(w, share)
        error = _error(w, *tried, grid, importance)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return scale, zero


def _error(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """[R, G, 1]."""
    rounded = grid.round(w, scale, zero).sub_(zero).mul_(scale)
    return rounded.sub_(w).square_().mul_(importance).sum(-1, keepdim=True)


def round_matrix(w: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """The codes of w [N, K], each number rounded for itself."""
    codes = torch.empty_like(w)

    def work(w: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        grouped = w.view(len(w), scales.shape[1], -1)
        codes.view(grouped.shape).copy_(grid.round(grouped, scales[..., None], zeros[..., None]))

    in_chunks(work, _num_rows(w), w, codes, scales, zeros)
    return codes


def values(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What codes [N, K] stand for; the codes' memory is used."""
    n, k = codes.shape
    grouped = codes.view(n, scales.shape[1], -1)
    return grouped.sub_(zeros[..., None]).mul_(scales[..., None]).view(n, k)


def _num_rows(w: Tensor) -> int:
    """Of a chunk of w."""
    return max(1, (CHUNK if w.device.type == "cpu" else CHUNK_ELSEWHERE) // w.shape[1])


def pieces(x: Tensor, length: int) -> list[Tensor]:
    """Views of x, `length` rows each, the last maybe less."""
    return [x[start : start + length] for start in range(0, len(x), length)]
