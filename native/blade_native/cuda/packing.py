"""The layout that linear.cu reads, which describes it: weights in the order of the tensor cores' fragments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from blade import Float8Weight
from blade.nn import expand_scales

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade import QuantizedWeight

TILE_N, TILE_K = 16, 64
MAX_FLOAT16 = 65504.0
Kind = Literal["SYMMETRIC", "ZEROS", "MINIMA", "FP8"]


class NotANumberError(ValueError):
    """A weight has NaN in it."""


@dataclass(frozen=True)
class Format:
    """One instantiation of the kernels. 5 and 6 bits are kept as 8, and so is a table's value."""

    bits: int
    group: int
    kind: Kind

    @property
    def num_parameters(self) -> int:
        return 2 if self.kind in ("ZEROS", "MINIMA") else 1

    @property
    def bytes_of_64(self) -> int:
        """What a tile of 16 channels by 64 takes on average, its groups' parameters included."""
        itemsize = 4 if self.kind == "FP8" else 2
        return TILE_N * TILE_K * self.bits // 8 + TILE_N * TILE_K // self.group * self.num_parameters * itemsize


@dataclass(frozen=True)
class Packed:
    """A matrix [num_out, num_in] on the device."""

    format: Format
    num_out: int
    num_in: int
    weight: Tensor  # [tiles, num_in / 64, bytes of a tile] uint8
    params: Tensor  # [tiles, num_in / group, parameters, 8, 2] float16, float32 for FP8


def covers(weight: QuantizedWeight) -> bool:
    """Whether there is a kernel: K in whole tiles, in their order, and not both minima and zeros."""
    if weight.q.shape[1] % TILE_K:
        return False
    if isinstance(weight, Float8Weight):
        return weight.block[1] % format_of(weight).group == 0 or weight.block[1] >= weight.q.shape[1]
    if weight.order is not None:
        return False
    return weight.minima is None or weight.zeros is None


def format_of(weight: QuantizedWeight) -> Format:
    """Scales of 8-bit floats are repeated for each group, which costs 3 or 6 percent of the weights."""
    if isinstance(weight, Float8Weight):
        return Format(8, 128 if weight.q.shape[1] % 128 == 0 else 64, "FP8")
    kind: Kind = "MINIMA" if weight.minima is not None else "ZEROS" if weight.zeros is not None else "SYMMETRIC"
    return Format(4 if weight.bits == 4 and weight.values is None else 8, weight.group, kind)


def pack(weight: QuantizedWeight, device: torch.device) -> Packed:
    """Scales and minima in other types become float16, which loses up to 2^-12 of each. Raises ValueError when one
    is beyond float16, and for 8-bit floats NotANumberError for NaN, which the kernel would take for a number."""
    chosen = format_of(weight)
    if isinstance(weight, Float8Weight):
        return _pack_fp8(chosen, weight, device)
    q = weight.q.to(device)
    if weight.values is not None:
        q = (torch.tensor(weight.values, device=device) + 128).to(torch.uint8)[q.int()]
    elif chosen.bits != weight.bits and chosen.kind == "SYMMETRIC":
        q = q + (128 - 2 ** (weight.bits - 1))
    parameters = [_float16("scales", weight.scales, weight.block_scales, device)]
    if weight.minima is not None:
        parameters.append(_float16("minima", weight.minima, weight.block_minima, device))
    if weight.zeros is not None:
        parameters.append(weight.zeros.to(device).half())
    return _packed(chosen, q, parameters)


def joined(parts: Seq[Packed]) -> list[Packed]:
    """Matrices stacked along N: neighbours that are packed alike become one, so that one launch multiplies them."""
    found = [parts[0]]
    for part in parts[1:]:
        last = found[-1]
        if (part.format, part.num_in) == (last.format, last.num_in) and last.num_out % TILE_N == 0:
            weight, params = torch.cat([last.weight, part.weight]), torch.cat([last.params, part.params])
            found[-1] = Packed(part.format, last.num_out + part.num_out, part.num_in, weight, params)
        else:
            found.append(part)
    return found


def _pack_fp8(chosen: Format, weight: Float8Weight, device: torch.device) -> Packed:
    bits = weight.q.view(torch.uint8).to(device)
    if bool(((bits & 0x7F) == 0x7F).any()):
        raise NotANumberError("the weight has NaN in it")
    return _packed(chosen, bits, [expand_scales(weight, chosen.group).to(device)])


def _float16(name: str, codes: Tensor, blocks: Tensor | None, device: torch.device) -> Tensor:
    values = codes = codes.to(device)
    if blocks is not None:
        n, num_blocks = blocks.shape
        values = (codes.float().view(n, num_blocks, -1) * blocks.to(device).float().unsqueeze(2)).view(n, -1)
    if not bool((values.abs() <= MAX_FLOAT16).all()):
        raise ValueError(f"{name}: a group's value is beyond float16")
    return values.half()


def _packed(chosen: Format, q: Tensor, parameters: list[Tensor]) -> Packed:
    n, k = q.shape
    q, tiles_k = _whole_tiles(q), k // TILE_K
    if chosen.bits == 4:
        q = q.view(-1, 2, 8, tiles_k, 4, 2, 4, 2)  # tile, j, g, tile of K, s, m, t, h
        nibbles = q.permute(0, 3, 2, 6, 4, 7, 5, 1)  # .., g, t, s, h, m, j
        weight = nibbles[..., 0] | nibbles[..., 1] << 4
    else:
        q = q.view(-1, 2, 8, tiles_k, 2, 2, 2, 4, 2)  # tile, j, g, tile of K, s >> 1, s & 1, m, t, h
        weight = q.permute(0, 3, 4, 2, 7, 5, 6, 1, 8)  # .., s >> 1, g, t, s & 1, m, j, h
    params = torch.stack([_whole_tiles(parameter) for parameter in parameters])  # [parameters, N, K / group]
    params = params.view(len(parameters), -1, 2, 8, k // chosen.group).permute(1, 4, 0, 3, 2)
    return Packed(chosen, n, k, weight.reshape(weight.shape[0], tiles_k, -1).contiguous(), params.contiguous())


def _whole_tiles(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % TILE_N)).contiguous()
