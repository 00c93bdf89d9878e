"""contracts.Quantization of HQQ (Badri and Shaji 2023): w = (q - zero) * scale, in groups that run on over rows.

Beside `W_q` and what describes it, each in a tensor of its own (`shape`, `nbits`, `axis` ...), lie `scale` and `zero`,
one for each group. The groups are W_q's rows, of which the first half or quarter has its integers in the high bits; of
3 bits a word of 32 has ten, and the last words are filled up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from blade import CheckpointError, GroupedWeight
from blade.nn import GroupedQuantization, Matrix
from blade.nn.format_settings import read_settings
from blade.nn.packing import GROUPS, checked, checked_scales, narrow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from blade.contracts import Weights

KNOWN = {"quant_config", "skip_modules"}  # what they say of a matrix, its own tensors do
BITS = (1, 2, 3, 4, 8)
PER_WORD = 10  # numbers of 3 bits
AS_THEY_ARE = {  # of the tensors that describe a matrix: the only value served, and what another one would mean
    "axis": (1, "groups of columns"),
    "view_as_float": (0, "integers that are to be taken for floats"),
    "quant_scale": (0, "scales that are quantised"),
    "quant_zero": (0, "zeros that are quantised"),
}
REMEDY = "Quantise it anew with axis=1 and nothing else, or use the model's unquantised form."


@dataclass(slots=True, frozen=True)
class Layout:
    """Of one matrix."""

    n: int
    k: int
    bits: int
    size: int  # numbers of a group in the checkpoint
    kept: int  # of one in the GroupedWeight

    @property
    def num_groups(self) -> int:
        return self.n * self.k // self.size

    @property
    def packed(self) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and dtype of W_q."""
        if self.bits == 3:
            return (-(-self.num_groups // PER_WORD), self.size), torch.int32
        return (self.num_groups * self.bits // 8, self.size), torch.uint8

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
        self.label = f"hqq, {bits}"

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        if f"{prefix}.W_q" not in weights.names():
            return None
        layout = _layout(prefix, weights)
        n, k, scales = layout.n, layout.k, narrow(checked_scales(f"{prefix}.scale", weights, None))
        return Matrix((n, k), n * k * layout.kept_bits // 8 + n * k // layout.kept * (scales.itemsize + 2))

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        layout = _layout(prefix, weights)
        n, k, num_groups = layout.n, layout.k, layout.num_groups
        q = _unpack(checked(f"{prefix}.W_q", weights, *layout.packed), layout)
        groups = torch.arange(0, n * k, layout.kept).view(n, -1) // layout.size
        scales, minima = _scales(prefix, weights, num_groups)
        return GroupedWeight(layout.kept_bits, layout.kept, q.view(n, k), scales[groups], minima[groups])


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
    n, k = sizes
    if len(packed) != 2 or 0 in packed or min(sizes) < 1 or not _holds(packed, n * k, bits):
        raise CheckpointError(f"Tensor {name} has shape {packed}, which is none for ({n}, {k}) of {bits} bits.")
    kept = next((group for group in GROUPS if k % group == 0 and packed[1] % group == 0), None)
    if kept is None:
        raise CheckpointError(
            f"Tensor {name}: rows of {k} numbers in groups of {packed[1]} do not divide into groups of {GROUPS[-1]}.",
            "Use the model's unquantised form.",
        )
    return Layout(n, k, bits, packed[1], kept)


def _number(name: str, weights: Weights, default: int | None = None) -> int:
    """The one in a tensor; `default` where there is none."""
    if default is not None and name not in weights.names():
        return default
    tensor = checked(name, weights, None, torch.uint8, torch.int32, torch.int64)
    if tensor.numel() != 1:
        raise CheckpointError(f"Tensor {name} is to hold one number.")
    return int(tensor)


def _scales(prefix: str, weights: Weights, num: int) -> tuple[Tensor, Tensor]:
    """The scale and the minimum of each group, -zero * scale: the tool's zeros are integers only where it is told to
    round them and not to optimise."""
    scales = checked_scales(f"{prefix}.scale", weights, (num, 1)).flatten()
    zeros = checked_scales(f"{prefix}.zero", weights, (num, 1)).flatten()
    minima = (-zeros.float() * scales.float()).half()
    if not bool(minima.isfinite().all()):
        raise CheckpointError(f"Tensors {prefix}.zero and {prefix}.scale make numbers beyond float16.")
    return narrow(scales), minima


def _holds(packed: tuple[int, ...], num: int, bits: int) -> bool:
    """Whether a W_q of that shape is for `num` numbers."""
    rows, size = packed
    if bits == 3:
        return num % size == 0 and rows == -(-num // size // PER_WORD)
    return rows * size * 8 == num * bits


def _unpack(packed: Tensor, layout: Layout) -> Tensor:
    """[groups, size]: the first rows from the highest bits, the last from the lowest."""
    bits = layout.bits
    if bits == 8:
        return packed
    used = bits * PER_WORD if bits == 3 else 8
    parts = [packed >> shift & (2**bits - 1) for shift in range(used - bits, -1, -bits)]
    return torch.cat(parts)[: layout.num_groups].to(torch.uint8)
