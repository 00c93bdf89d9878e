"""GGML's block formats to floats: d * q, d * q + m or d * q - m for blocks of 32 or 256 numbers.

No product needs more than float32's 24 significant bits, so float32 results are those of GGML's own reference to the
last bit; other types are these, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blade.checkpoint.gguf.blocks import codes, half, quants
from blade.checkpoint.gguf.file import GGMLType
from blade.chunks import in_chunks

CHUNK = 1 << 19  # numbers decoded at a time: enough to outweigh the calls, few enough for the cache
PLAIN_DTYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def dequantize(kind: GGMLType, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of raw, [rows, row_bytes] uint8 of whole blocks, as [rows, row_bytes / block_bytes * block_size].

    Plain types that are asked for as they are come without a copy.
    """
    if kind in PLAIN_DTYPES:
        return raw.view(PLAIN_DTYPES[kind]).to(dtype)
    blocks, decode = raw.reshape(-1, kind.block_bytes), _DECODERS[kind]
    out = torch.empty(len(blocks), kind.block_size, dtype=dtype)

    def work(some: Tensor, target: Tensor) -> None:
        """Straight into float32, through a scratch that stays in cache into other types."""
        floats = target if dtype == torch.float32 else torch.empty(target.shape)
        decode(some, floats)
        if floats is not target:
            target.copy_(floats)

    in_chunks(work, CHUNK // kind.block_size, blocks, out)
    return out.view(len(raw), -1)


def _scaled(
    kind: GGMLType, zero: int, scale_at: int, minimum_at: int | None = None
) -> Callable[[Tensor, Tensor], None]:
    """A decoder of blocks with one float16 scale and maybe a minimum."""

    def decode(blocks: Tensor, out: Tensor) -> None:
        q = quants(kind, blocks).view(torch.int8)
        out.copy_(q - zero if zero else q).mul_(half(blocks, scale_at).float())
        if minimum_at is not None:
            out.add_(half(blocks, minimum_at).float())

    return decode


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(half(blocks, 0).float())


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    q = quants(GGMLType.Q6_K, blocks).view(torch.int8) - 32
    d = blocks[:, 192:208].view(torch.int8) * half(blocks, 208).float()  # [B, 16]: one for 16 numbers
    out.view(-1, 16, 16).copy_(q.view(-1, 16, 16)).mul_(d.unsqueeze(2))


def _scale_k(kind: GGMLType) -> Callable[[Tensor, Tensor], None]:
    """d * q - m with one d and m, 6 bits each times a float16 of the block, for 32 numbers."""

    def decode(blocks: Tensor, out: Tensor) -> None:
        d, m = codes(blocks)
        d, m = d * half(blocks, 0).float(), m * half(blocks, 2).float()  # [B, 8]
        groups = out.view(-1, 8, 32)
        groups.copy_(quants(kind, blocks).view(-1, 8, 32)).mul_(d.unsqueeze(2)).sub_(m.unsqueeze(2))

    return decode


_DECODERS: dict[GGMLType, Callable[[Tensor, Tensor], None]] = {
    GGMLType.Q4_0: _scaled(GGMLType.Q4_0, 8, 0),
    GGMLType.Q4_1: _scaled(GGMLType.Q4_1, 0, 0, 2),
    GGMLType.Q5_0: _scaled(GGMLType.Q5_0, 16, 0),
    GGMLType.Q5_1: _scaled(GGMLType.Q5_1, 0, 0, 2),
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _scale_k(GGMLType.Q4_K),
    GGMLType.Q5_K: _scale_k(GGMLType.Q5_K),
    GGMLType.Q6_K: _q6_k,
}
