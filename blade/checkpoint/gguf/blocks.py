"""What GGML's blocks of 32 or 256 numbers hold: integers q, and the scales and minima of their groups.

Block layouts after https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. The integers are put
together eight bytes at a time in int64 lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blade.checkpoint.gguf.file import GGMLType

_BYTES = 0x0101010101010101  # 1 in each byte of an int64


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: [B, 1]."""
    return blocks[:, at : at + 2].view(torch.float16)


def codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: the codes of 6 bits of the groups' scales and minima, [B, 8] uint8 each."""
    low_d, low_m, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)  # 6 bits, 6 bits, 4 + 4 bits
    d = torch.cat([low_d & 63, (high & 15) | (low_d >> 2 & 48)], dim=1)
    m = torch.cat([low_m & 63, (high >> 4) | (low_m >> 2 & 48)], dim=1)
    return d, m


def quants(kind: GGMLType, blocks: Tensor) -> Tensor:
    """The integers q, unsigned: [B, block_size] uint8."""
    return _QUANTS[kind](blocks).view(torch.uint8).view(-1, kind.block_size)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Fields of 1, 2 or 4 bits, [..., n] uint8 -> [..., n * 8 / bits] uint8 as [..., n / bits] int64: first the lowest
    field of each byte, then the next of each, and so on."""
    lanes = packed.clone(memory_format=torch.contiguous_format).view(torch.int64)
    mask = _BYTES * ((1 << bits) - 1)
    return torch.cat([(lanes >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def _spread_bits(packed: Tensor) -> Tensor:
    """Bit i of a byte to byte i of an int64, as 0 or 16: [..., n] uint8 -> [..., n] int64."""
    lanes = packed.to(torch.int64).mul_(_BYTES).bitwise_and_(-0x7FBFDFEFF7FBFDFF)  # 0x80, 0x40 ... 0x01
    return lanes.add_(_BYTES * 0x7F).bitwise_right_shift_(3).bitwise_and_(_BYTES * 16)


def _q5_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, 48:].view(-1, 4, 32), 4)
    return low | (_fields(blocks[:, 16:48], 1).view_as(low) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, :128].view(-1, 2, 64), 4)
    return low | (_fields(blocks[:, 128:192].view(-1, 2, 32), 2) << 4)


_QUANTS: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.Q4_0: lambda blocks: _fields(blocks[:, 2:], 4),
    GGMLType.Q4_1: lambda blocks: _fields(blocks[:, 4:], 4),
    GGMLType.Q5_0: lambda blocks: _fields(blocks[:, 6:], 4) | _spread_bits(blocks[:, 2:6]),
    GGMLType.Q5_1: lambda blocks: _fields(blocks[:, 8:], 4) | _spread_bits(blocks[:, 4:8]),
    GGMLType.Q8_0: lambda blocks: blocks[:, 2:] ^ 128,  # signed there
    GGMLType.Q4_K: lambda blocks: _fields(blocks[:, 16:].view(-1, 4, 32), 4),
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
