"""GGML's block formats as grouped weights, without loss: the same integers, scales and minima, in tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from blade.checkpoint.gguf.blocks import VALUES, codes, codes_2, codes_3, codes_4, half, powers, quants
from blade.checkpoint.gguf.file import GGMLType
from blade.chunks import in_chunks
from blade.types import GroupedWeight

CHUNK = 1 << 19  # numbers unpacked at a time


def grouped(kind: GGMLType, raw: Tensor) -> GroupedWeight:
    """raw, [N, row_bytes] uint8 of whole blocks, as a matrix [N, row_bytes / block_bytes * block_size]. Zeros are those
    that GroupedWeight implies; minima of K-quants are negated, for they subtract them. Integers of fewer bits than 4
    are kept in 4."""
    blocks = raw.reshape(-1, kind.block_bytes)
    sample, group = scales(kind, blocks[:1])
    q = torch.empty(len(blocks), kind.block_size, dtype=torch.uint8)
    tensors = [torch.empty(len(blocks), part.shape[1], dtype=part.dtype) for part in sample.values()]

    def unpack(some: Tensor, out: Tensor, *outs: Tensor) -> None:
        out.copy_(quants(kind, some))
        for target, part in zip(outs, scales(kind, some)[0].values(), strict=True):
            target.copy_(part)

    in_chunks(unpack, CHUNK // kind.block_size, blocks, q, *tensors)
    n = len(raw)
    named: dict[str, Any] = {name: tensor.view(n, -1) for name, tensor in zip(sample, tensors, strict=True)}
    return GroupedWeight(kind.bits, group, q.view(n, -1), **named, values=VALUES.get(kind))


def scales(kind: GGMLType, blocks: Tensor) -> tuple[dict[str, Tensor], int]:
    """The other tensors of the weight, a row for each block, and the numbers in a group."""
    return _SCALES[kind](blocks)


def _half_at(scale: int, minimum: int | None = None) -> _Scales:
    """One scale of a block of 32 numbers, in float16, and maybe a minimum."""

    def read(blocks: Tensor) -> tuple[dict[str, Tensor], int]:
        tensors = {"scales": half(blocks, scale)}
        return tensors if minimum is None else tensors | {"minima": half(blocks, minimum)}, 32

    return read


def _of_two(blocks: Tensor, at: int) -> tuple[dict[str, Tensor], int]:
    """One scale of a block of 256 numbers, which is that of two groups."""
    return {"scales": half(blocks, at).expand(-1, 2)}, 128


def _with_minima(codes: tuple[Tensor, Tensor], blocks: Tensor, at: int, group: int) -> tuple[dict[str, Tensor], int]:
    scales, minima = codes
    halves = {"block_scales": half(blocks, at), "block_minima": -half(blocks, at + 2)}
    return {"scales": scales, "minima": minima, **halves}, group


_Scales: TypeAlias = Callable[[Tensor], tuple[dict[str, Tensor], int]]
_SCALES: dict[GGMLType, _Scales] = {
    GGMLType.Q4_0: _half_at(0),
    GGMLType.Q4_1: _half_at(0, 2),
    GGMLType.Q5_0: _half_at(0),
    GGMLType.Q5_1: _half_at(0, 2),
    GGMLType.Q8_0: _half_at(0),
    GGMLType.Q2_K: lambda blocks: _with_minima(codes_2(blocks), blocks, 80, 16),
    GGMLType.Q3_K: lambda blocks: ({"scales": codes_3(blocks), "block_scales": half(blocks, 108)}, 16),
    GGMLType.Q4_K: lambda blocks: _with_minima(codes(blocks), blocks, 0, 32),
    GGMLType.Q5_K: lambda blocks: _with_minima(codes(blocks), blocks, 0, 32),
    GGMLType.Q6_K: lambda blocks: (
        {"scales": blocks[:, 192:208].view(torch.int8), "block_scales": half(blocks, 208)},
        16,
    ),
    GGMLType.IQ4_NL: _half_at(0),
    GGMLType.IQ4_XS: lambda blocks: ({"scales": codes_4(blocks), "block_scales": half(blocks, 0)}, 32),
    GGMLType.TQ1_0: lambda blocks: _of_two(blocks, 52),
    GGMLType.TQ2_0: lambda blocks: _of_two(blocks, 64),
    GGMLType.MXFP4: lambda blocks: ({"scales": powers(blocks)}, 32),
    GGMLType.Q1_0: lambda blocks: ({"scales": half(blocks, 0)}, 128),
}
