"""Matrices in blocks of numbers that share their largest: w = table[q] * absmax, blocks running on over rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING

import torch

from blade import CheckpointError, GroupedWeight
from blade.nn import Keys
from blade.nn.packing import checked, checked_scales, narrow, running_group

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Weights

STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
LARGEST = range(64 * 16, 127 * 16 + 1)  # what 1.0 may become in the table of integers, in sixteenths


@dataclass(slots=True, frozen=True)
class Blocks:
    """What the headers and `quant_state`, a JSON text in a tensor, say of a matrix."""

    name: str
    shape: tuple[int, int]
    size: int  # numbers of a block
    nested: tuple[int, float] | None  # where absmax is quantised itself: numbers of its blocks, and what is added

    @property
    def group(self) -> int:
        """Numbers of a row that share a scale: a row may begin inside a block."""
        return running_group(self.shape[1], self.size)

    def weight(self, weights: Weights) -> GroupedWeight:
        """The table as integers; see `integer_table`."""
        n, k = self.shape
        packed = checked(self.name, weights, None, torch.uint8).flatten()
        if len(packed) * 2 != n * k:
            raise CheckpointError(
                f"Tensor {self.name} has {len(packed)} bytes, not those of {n} x {k} numbers of 4 bits."
            )
        q = torch.stack([packed >> 4, packed & 15], dim=1).view(n, k)
        largest, values = integer_table(tuple(_table(f"{self.name}.quant_map", weights, 16).tolist()))
        absmax = self._absmax(weights) / largest
        starts = torch.arange(0, n * k, self.group).view(n, -1)
        return GroupedWeight(4, self.group, q, narrow(absmax[starts // self.size]), values=values)

    def _absmax(self, weights: Weights) -> Tensor:
        """[blocks] float32."""
        name, num_blocks = f"{self.name}.absmax", -(-prod(self.shape) // self.size)
        if self.nested is None:
            return checked_scales(name, weights, (num_blocks,)).float()
        size, offset = self.nested
        outer = checked_scales(f"{self.name}.nested_absmax", weights, (-(-num_blocks // size),)).float()
        table = _table(f"{self.name}.nested_quant_map", weights, 256)
        codes = checked(name, weights, (num_blocks,), torch.uint8)
        return table[codes.long()] * outer[torch.arange(num_blocks) // size] + offset


def read_blocks(name: str, weights: Weights) -> Blocks:
    """Raises CheckpointError where quant_state is missing or makes no sense."""
    state = next((there for kind in STATES if (there := f"{name}.{kind}") in weights.names()), None)
    if state is None:
        raise CheckpointError(f"The checkpoint has no tensor {name}.{STATES[0]}, without which {name} means nothing.")
    keys = Keys(_json(state, checked(state, weights, None, torch.uint8)), f"({state}) ")
    shape = keys.sizes("shape")
    if len(shape) != 2:
        keys.refuse("shape", "two integers")
    nested = None
    if f"{name}.nested_absmax" in weights.names():
        nested = keys.integer("nested_blocksize"), keys.signed("nested_offset")
    return Blocks(name, (shape[0], shape[1]), keys.integer("blocksize"), nested)


def _json(name: str, tensor: Tensor) -> dict[str, object]:
    try:
        found = json.loads(bytes(tensor.flatten().tolist()))
    except (ValueError, RecursionError):
        found = None
    if type(found) is not dict:
        raise CheckpointError(f"Tensor {name} holds no JSON object.")
    return found


def _table(name: str, weights: Weights, size: int) -> Tensor:
    return checked_scales(name, weights, (size,)).float()


@cache
def integer_table(table: tuple[float, ...]) -> tuple[float, tuple[int, ...]]:
    """A table of values between -1 and 1 as integers, for kernels that multiply integers, and what of them stands for
    1: of all choices that of least squared error. For NF4 its root mean square is 0.0017, for FP4 0.0011."""
    exact = torch.tensor(table, dtype=torch.float64)
    if float(exact.abs().max()) > 1:
        raise CheckpointError("A quant_map holds numbers beyond 1.")
    choices = torch.tensor(LARGEST, dtype=torch.float64)[:, None] / 16
    errors = ((exact * choices).round() / choices - exact).square().sum(dim=1)
    best = float(choices[int(errors.argmin())])
    return best, tuple((exact * best).round().int().tolist())
