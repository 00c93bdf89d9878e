"""GGML's block formats as grouped weights, without loss: the same integers, scales and minima, in tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blade.checkpoint.gguf.blocks import codes, half, quants
from blade.checkpoint.gguf.file import GGMLType
from blade.chunks import in_chunks
from blade.types import GroupedWeight

CHUNK = 1 << 19  # numbers unpacked at a time


def grouped(kind: GGMLType, raw: Tensor) -> GroupedWeight:
    """raw, [N, row_bytes] uint8 of whole blocks, as a matrix [N, row_bytes / block_bytes * block_size]. Zeros are those
    that GroupedWeight implies; minima of K-quants are negated, for they subtract them."""
    blocks = raw.reshape(-1, kind.block_bytes)
    sample, group = _scales(kind, blocks[:1])
    q = torch.empty(len(blocks), kind.block_size, dtype=torch.uint8)
    tensors = [torch.empty(len(blocks), part.shape[1], dtype=part.dtype) for part in sample.values()]

    def unpack(some: Tensor, out: Tensor, *outs: Tensor) -> None:
        out.copy_(quants(kind, some))
        for target, part in zip(outs, _scales(kind, some)[0].values(), strict=True):
            target.copy_(part)

    in_chunks(unpack, CHUNK // kind.block_size, blocks, q, *tensors)
    n = len(raw)
    named: dict[str, Any] = {name: tensor.view(n, -1) for name, tensor in zip(sample, tensors, strict=True)}
    return GroupedWeight(kind.bits, group, q.view(n, -1), **named)


def _scales(kind: GGMLType, blocks: Tensor) -> tuple[dict[str, Tensor], int]:
    """The other tensors of the weight, a row for each block, and the numbers in a group."""
    if kind in (GGMLType.Q4_K, GGMLType.Q5_K):
        scales, minima = codes(blocks)
        halves = {"block_scales": half(blocks, 0), "block_minima": -half(blocks, 2)}
        return {"scales": scales, "minima": minima, **halves}, 32
    if kind == GGMLType.Q6_K:
        return {"scales": blocks[:, 192:208].view(torch.int8), "block_scales": half(blocks, 208)}, 16
    tensors = {"scales": half(blocks, 0)}
    if kind in (GGMLType.Q4_1, GGMLType.Q5_1):
        tensors["minima"] = half(blocks, 2)
    return tensors, 32
