"""Matrices of 2, 3, 4 or 8 bits in words of 32, as AutoGPTQ and AutoAWQ lay them out: `qweight`, `qzeros`, `scales`.

Both keep W [N, K] transposed: scales are [ceil(K / group), N]. After Frantar et al. 2023 (GPTQ) and Lin et al. 2024
(AWQ); AutoRound (Cheng et al. 2024) writes either.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blade.chunks import in_chunks
from blade.errors import CheckpointError
from blade.nn.grouped import GroupedQuantization, Matrix
from blade.nn.packing import (
    CHUNK,
    checked,
    checked_scales,
    grouped,
    grouped_matrix,
    kept_group,
    matrix_shape,
    order_of,
    regroup,
    unpack,
)

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Weights
    from blade.types import GroupedWeight

log = logging.getLogger("blade.formats")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's eight, from the lowest bits on


@dataclass(slots=True, frozen=True)
class GPTQWords:
    """qweight int32 [K bits / 32, N] packed along K; qzeros [groups, N bits / 32] along N; maybe g_idx [K], the group
    of each feature."""

    bits: int
    group: int | None  # None: a row
    symmetric: bool
    less_one: bool  # zeros are stored less 1, as in GPTQ's first format

    def matrix(self, prefix: str, weights: Weights) -> Matrix:
        n, k, group = self._sizes(prefix, weights)
        return grouped_matrix(n, k, self.bits, group, zeros=not self.symmetric)

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        n, k, group = self._sizes(prefix, weights)
        num_groups = -(-k // group)
        words = checked(f"{prefix}.qweight", weights, (k * self.bits // 32, n), torch.int32)
        scales = checked_scales(f"{prefix}.scales", weights, (num_groups, n)).T
        zeros = self._zeros(prefix, weights, n, num_groups)
        q = unpack(words.T, self.bits, k)
        order = order_of(f"{prefix}.g_idx", weights, k, group)
        if order is not None:
            q = q[:, order]
        kept = kept_group(k, group)
        if zeros is not None:
            zeros = regroup(zeros, k, group, kept)
        return grouped(q, self.bits, kept, regroup(scales, k, group, kept), zeros, order)

    def _sizes(self, prefix: str, weights: Weights) -> tuple[int, int, int]:
        """N, K and the numbers of a group."""
        rows, n = matrix_shape(f"{prefix}.qweight", weights)
        if rows * 32 % self.bits:
            raise CheckpointError(
                f"Tensor {prefix}.qweight has {rows} rows, which cannot hold whole numbers of {self.bits} bits."
            )
        k = rows * 32 // self.bits
        return n, k, min(self.group or k, k)

    def _zeros(self, prefix: str, weights: Weights, n: int, num_groups: int) -> Tensor | None:
        """[N, groups] uint8; None where all are 2**(bits - 1)."""
        name, middle = f"{prefix}.qzeros", 2 ** (self.bits - 1)
        words = checked(name, weights, (num_groups, -(-n * self.bits // 32)), torch.int32)
        stored = unpack(words, self.bits, n)
        less_one = self.less_one
        if self.symmetric and less_one and bool((stored == middle).all()):
            less_one = False  # the second format under the first one's name, as some tools write it
            log.debug("%s: zeros of %d are taken as they are", name, middle)
        if bool((stored == middle - less_one).all()):
            return None
        if less_one and self.bits == 8 and int(stored.max()) == 255:
            raise CheckpointError(f"Tensor {name} holds a zero of 256, which is beyond 8 bits.")
        return (stored + int(less_one)).T.contiguous()


@dataclass(slots=True, frozen=True)
class AWQWords:
    """qweight int32 [K, N / 8], qzeros [groups, N / 8]: eight columns to a word in the order AWQ_COLUMNS ("gemm")."""

    group: int | None  # None: a row

    def matrix(self, prefix: str, weights: Weights) -> Matrix:
        n, k, group = self._sizes(prefix, weights)
        return grouped_matrix(n, k, 4, group, zeros=True)

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        n, k, group = self._sizes(prefix, weights)
        num_groups = -(-k // group)
        q = _columns(checked(f"{prefix}.qweight", weights, (k, n // 8), torch.int32))
        zeros = _columns(checked(f"{prefix}.qzeros", weights, (num_groups, n // 8), torch.int32))
        scales = checked_scales(f"{prefix}.scales", weights, (num_groups, n)).T
        kept = kept_group(k, group)
        return grouped(q, 4, kept, regroup(scales, k, group, kept), regroup(zeros, k, group, kept))

    def _sizes(self, prefix: str, weights: Weights) -> tuple[int, int, int]:
        k, words = matrix_shape(f"{prefix}.qweight", weights)
        return words * 8, k, min(self.group or k, k)


def _columns(words: Tensor) -> Tensor:
    """[R, N / 8] int32 -> [N, R] uint8."""
    num_rows, num_words = words.shape
    out = torch.empty(num_words, 8, num_rows, dtype=torch.uint8)

    def work(words: Tensor, out: Tensor) -> None:
        words = words.contiguous()
        for i, column in enumerate(AWQ_COLUMNS):
            out[:, column] = words >> 4 * i & 15

    in_chunks(work, max(1, CHUNK // (8 * num_rows)), words.T, out)
    return out.flatten(0, 1)


class WordQuantization(GroupedQuantization):
    """A format of such matrices: a subclass says how each is laid out."""

    tensors = ("qweight", "weight")

    @abstractmethod
    def layout(self, prefix: str) -> GPTQWords | AWQWords:
        """Of the matrix under `prefix`, if it is quantised."""

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        if f"{prefix}.qweight" not in weights.names():
            return None
        return self.layout(prefix).matrix(prefix, weights)

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        return self.layout(prefix).weight(prefix, weights)
