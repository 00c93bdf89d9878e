"""Linears whose rows come in another order than the checkpoint has them in, whatever format they are in."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from blade.types import Float8Weight, GGMLBlocks, GroupedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Linear, Ops
    from blade.types import QuantizedWeight

_ROWS = ("q", "scales", "minima", "zeros", "block_scales", "block_minima")  # of a GroupedWeight: a row for each of W's


class RowOrder:
    """The op set `ops`, for the loading of one stack: of the matrices that it is given, one after the other, row i
    becomes row order[i] of the stack."""

    def __init__(self, ops: Ops, order: Tensor) -> None:
        self._ops, self._order, self._done = ops, order, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        (rows,) = self._next([len(weight)])
        return self._ops.linear(weight[rows], None if bias is None else bias[rows])

    def quantized_linear(self, weights: Seq[QuantizedWeight], bias: Tensor | None) -> Linear:
        orders = self._next([len(weight.q) for weight in weights])
        taken = [take_rows(weight, rows) for weight, rows in zip(weights, orders, strict=True)]
        return self._ops.quantized_linear(taken, _stacked(bias, orders))

    def blocks_linear(self, blocks: Seq[GGMLBlocks], bias: Tensor | None) -> Linear | None:
        done, orders = self._done, self._next([each.shape[0] for each in blocks])
        taken = [replace(each, raw=each.raw[rows]) for each, rows in zip(blocks, orders, strict=True)]
        linear = self._ops.blocks_linear(taken, _stacked(bias, orders))
        if linear is None:
            self._done = done  # they will be given as grouped weights
        return linear

    def _next(self, sizes: list[int]) -> list[Tensor]:
        """The order within each of the next matrices, which have so many rows."""
        orders = []
        for size in sizes:
            rows = self._order[self._done : self._done + size] - self._done
            if len(rows) != size or int(rows.min()) < 0 or int(rows.max()) >= size:
                raise ValueError(f"the order of rows leaves a matrix of {size} rows")
            orders.append(rows)
            self._done += size
        return orders


def as_ops(order: RowOrder) -> Ops:
    """It has all of the op set's methods."""
    return cast("Ops", order)


def take_rows(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """The weight with its rows in another order, [N] int64."""
    if isinstance(weight, GroupedWeight):
        tensors = {name: value[rows] for name in _ROWS if (value := getattr(weight, name)) is not None}
        return replace(weight, **tensors)
    height, width = weight.block
    q = weight.q.view(torch.uint8)[rows].view(weight.q.dtype)
    blocks = rows.view(-1, height) // height if len(rows) % height == 0 else None
    if blocks is not None and bool((blocks == blocks[:, :1]).all()):  # whole blocks move
        return Float8Weight(q, weight.scales[blocks[:, 0]], weight.block)
    return Float8Weight(q, weight.scales[rows // height], (1, width))


def _stacked(bias: Tensor | None, orders: list[Tensor]) -> Tensor | None:
    if bias is None:
        return None
    parts = bias.split_with_sizes([len(rows) for rows in orders])
    return torch.cat([part[rows] for part, rows in zip(parts, orders, strict=True)])
