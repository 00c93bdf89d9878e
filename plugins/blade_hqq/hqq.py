"""contracts.Quantization of HQQ (Badri and Shaji 2023): w = (q - zero) * scale, in groups that run on over rows.

Beside `W_q` and what describes it, each in a tensor of its own (`shape`, `nbits`, `axis` ...), lie `scale` and `zero`,
one for each group. The groups are the rows (axis 1) or the columns (axis 0) of the matrix's numbers in another shape,
of whose rows W_q has the first half or quarter in the high bits; of 3 bits a word of 32 has ten, and the last words are
filled up. With axis 0 no two neighbours in a row of the matrix are of one group, so that it becomes plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from blade import CheckpointError, GroupedWeight
from blade.nn import GroupedQuantization
from blade.nn.format_settings import read_settings
from blade.nn.packing import checked, checked_scales, matrix_of, narrow, running_group

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from blade.contracts import Weights
    from blade.nn import Matrix

KNOWN = {"quant_config", "skip_modules"}  # what they say of a matrix, its own tensors do
BITS = (1, 2, 3, 4, 8)
PER_WORD = 10  # numbers of 3 bits
AS_THEY_ARE = {  # of the tensors that describe a matrix: the only value served, and what another one would mean
    "view_as_float": (0, "integers that are to be taken for floats"),
    "quant_scale": (0, "scales that are quantised"),
    "quant_zero": (0, "zeros that are quantised"),
}
REMEDY = "Quantise it anew without that, or use the model's unquantised form."


@dataclass(slots=True, frozen=True)
class Layout:
    """Of one matrix."""

    n: int
    k: int
    bits: int
    axis: int
    rows: int  # of all numbers in W_q's shape, unpacked
    columns: int

    @property
    def kept(self) -> int:
        """Numbers of a group in the GroupedWeight."""
        return running_group(self.k, self.columns) if self.axis else 1

    @property
    def scales(self) -> tuple[int, int]:
        """Their shape."""
        return (self.rows, 1) if self.axis else (1, self.columns)

    @property
    def packed(self) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and dtype of W_q."""
        if self.bits == 3:
            return (-(-self.rows // PER_WORD), self.columns), torch.int32
        return (self.rows * self.bits // 8, self.columns), torch.uint8

    @property
    def kept_bits(self) -> int:
        return max(4, self.bits)


class HQQ(GroupedQuantization):
    """Which modules are plain is seen from their tensors."""

    tensors = ("W_q", "weight")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        config = read_settings(settings, KNOWN, {}).section("quant_config")
        common = config.section("weight_quant_params")
        bits = f"{common.integer('nbits')} bits" if common.has("nbits") else "by module"
        plain = common.has("axis") and common.integer("axis", minimum=0) == 0
        self.label = f"hqq, {bits}{', as plain numbers for axis is 0' if plain else ''}"

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        if f"{prefix}.W_q" not in weights.names():
            return None
        layout = _layout(prefix, weights)
        n, k, scales = layout.n, layout.k, narrow(checked_scales(f"{prefix}.scale", weights, None))
        beside = n * k // layout.kept * (scales.itemsize + 2)
        return matrix_of(n, k, layout.kept, n * k * layout.kept_bits // 8 + beside)

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        layout = _layout(prefix, weights)
        n, k = layout.n, layout.k
        q = _unpack(checked(f"{prefix}.W_q", weights, *layout.packed), layout)
        scales, minima = _scales(prefix, weights, layout)
        if layout.axis == 0:
            scales, minima = (each.expand(layout.rows, -1).reshape(n, k) for each in (scales, minima))
        else:
            groups = torch.arange(0, n * k, layout.kept).view(n, -1) // layout.columns
            scales, minima = scales.flatten()[groups], minima.flatten()[groups]
        return GroupedWeight(layout.kept_bits, layout.kept, q.view(n, k), scales, minima)


def _layout(prefix: str, weights: Weights) -> Layout:
    """By the tensors that describe the matrix. Raises CheckpointError where they do not belong to it, or are of a
    layout that is not served."""
    name = f"{prefix}.W_q"
    for key, (served, meaning) in AS_THEY_ARE.items():
        if (found := _number(f"{prefix}.{key}", weights, served)) != served:
            raise CheckpointError(f"Tensor {prefix}.{key} is {found}: {meaning} are not served.", REMEDY)
    bits, packed = _number(f"{prefix}.nbits", weights), tuple(weights.shape(name))
    if bits not in BITS:
        raise CheckpointError(f"Tensor {prefix}.nbits is {bits}; served are {', '.join(map(str, BITS))}.", REMEDY)
    sizes = checked(f"{prefix}.shape", weights, (2,), torch.int64, torch.int32).tolist()
    axis = _number(f"{prefix}.axis", weights, 1)
    if axis not in (0, 1):
        raise CheckpointError(f"Tensor {prefix}.axis is {axis}, neither 0 nor 1.")
    n, k = sizes
    if len(packed) != 2 or 0 in packed or min(sizes) < 1 or not _holds(packed, n * k, bits):
        raise CheckpointError(f"Tensor {name} has shape {packed}, which is none for ({n}, {k}) of {bits} bits.")
    return Layout(n, k, bits, axis, n * k // packed[1], packed[1])


def _number(name: str, weights: Weights, default: int | None = None) -> int:
    """The one in a tensor; `default` where there is none."""
    if default is not None and name not in weights.names():
        return default
    tensor = checked(name, weights, None, torch.uint8, torch.int32, torch.int64)
    if tensor.numel() != 1:
        raise CheckpointError(f"Tensor {name} is to hold one number.")
    return int(tensor)


def _scales(prefix: str, weights: Weights, layout: Layout) -> tuple[Tensor, Tensor]:
    """The scale and the minimum of each group, -zero * scale: the tool's zeros are integers only where it is told to
    round them and not to optimise."""
    scales = checked_scales(f"{prefix}.scale", weights, layout.scales)
    zeros = checked_scales(f"{prefix}.zero", weights, layout.scales)
    minima = (-zeros.float() * scales.float()).half()
    if not bool(minima.isfinite().all()):
        raise CheckpointError(f"Tensors {prefix}.zero and {prefix}.scale make numbers beyond float16.")
    return narrow(scales), minima


def _holds(packed: tuple[int, ...], num: int, bits: int) -> bool:
    """Whether a W_q of that shape is for `num` numbers."""
    rows, columns = packed
    if bits == 3:
        return num % columns == 0 and rows == -(-num // columns // PER_WORD)
    return rows * columns * 8 == num * bits


def _unpack(packed: Tensor, layout: Layout) -> Tensor:
    """[rows, columns]: the first rows from the highest bits, the last from the lowest."""
    bits = layout.bits
    if bits == 8:
        return packed
    used = bits * PER_WORD if bits == 3 else 8
    parts = [packed >> shift & (2**bits - 1) for shift in range(used - bits, -1, -bits)]
    return torch.cat(parts)[: layout.rows].to(torch.uint8)
