"""What GGML's blocks of 32 or 256 numbers hold: integers q, and the scales and minima of their groups.

Block layouts after https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. The integers are put
together eight bytes at a time in int64 lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blade.checkpoint.gguf.file import GGMLType

_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
VALUES = {  # of the types whose integers are places in a table
    GGMLType.IQ4_NL: _NON_LINEAR,
    GGMLType.IQ4_XS: _NON_LINEAR,
    GGMLType.MXFP4: (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),  # twice those of FP4
}
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


def codes_2(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q2_K: the codes of 4 bits of the groups' scales and minima, [B, 16] uint8 each."""
    return blocks[:, :16] & 15, blocks[:, :16] >> 4


def codes_3(blocks: Tensor) -> Tensor:
    """Of Q3_K: the groups' scales, of 6 bits, [B, 16] int8."""
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = torch.cat([low & 15, low >> 4], dim=1)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    return (low | high << 4).view(torch.int8) - 32


def codes_4(blocks: Tensor) -> Tensor:
    """Of IQ4_XS: the groups' scales, of 6 bits, [B, 8] int8."""
    low, high = blocks[:, 4:8], blocks[:, 2:4]
    low = torch.stack([low & 15, low >> 4], dim=2).flatten(1)
    high = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    return (low | high << 4).view(torch.int8) - 32


def powers(blocks: Tensor) -> Tensor:
    """Of MXFP4: the scales, powers of two from 2^-128 to 2^127 for numbers twice as large, [B, 1] bfloat16."""
    exponents = blocks[:, :1].to(torch.int16)
    bits = torch.where(exponents < 2, 0x20 << exponents, exponents - 1 << 7)  # below 2^-126: subnormal
    return bits.to(torch.int16).view(torch.bfloat16)


def quants(kind: GGMLType, blocks: Tensor) -> Tensor:
    """The integers q, unsigned: [B, block_size] uint8. Of types without minima or a table 2**(kind.bits - 1) is 0."""
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


def _q2_k(blocks: Tensor) -> Tensor:
    return _fields(blocks[:, 16:80].view(-1, 2, 32), 2)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, 32:96].view(-1, 2, 32), 2)
    return (low | (_fields(blocks[:, :32], 1).view_as(low) << 2)) + 4 * _BYTES


def _tq1_0(blocks: Tensor) -> Tensor:
    """Five digits of base 3 in a byte, as a fraction: the first is what three times it has before the point."""
    parts = [(blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)]
    digits = [(part * 3**place).to(torch.int16) * 3 >> 8 for part, num in parts for place in range(num)]
    return torch.cat(digits, dim=1).to(torch.uint8) + 7


_QUANTS: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.Q4_0: lambda blocks: _fields(blocks[:, 2:], 4),
    GGMLType.Q4_1: lambda blocks: _fields(blocks[:, 4:], 4),
    GGMLType.Q5_0: lambda blocks: _fields(blocks[:, 6:], 4) | _spread_bits(blocks[:, 2:6]),
    GGMLType.Q5_1: lambda blocks: _fields(blocks[:, 8:], 4) | _spread_bits(blocks[:, 4:8]),
    GGMLType.Q8_0: lambda blocks: blocks[:, 2:] ^ 128,  # signed there
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: lambda blocks: _fields(blocks[:, 16:].view(-1, 4, 32), 4),
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: lambda blocks: _fields(blocks[:, 2:], 4),
    GGMLType.IQ4_XS: lambda blocks: _fields(blocks[:, 8:].view(-1, 8, 16), 4),
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: lambda blocks: _fields(blocks[:, :64].view(-1, 2, 32), 2) + 7 * _BYTES,
    GGMLType.MXFP4: lambda blocks: _fields(blocks[:, 1:], 4),
    GGMLType.Q1_0: lambda blocks: (_spread_bits(blocks[:, 2:]) >> 3) + 7 * _BYTES,
}
