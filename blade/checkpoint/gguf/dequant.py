"""GGML's block formats to floats: d * q or d * q + m for blocks of 32 to 256 numbers.

No product needs more than float32's 24 significant bits, so float32 results are those of GGML's own reference to the
last bit; other types are these, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blade.checkpoint.gguf.blocks import VALUES, quants
from blade.checkpoint.gguf.file import GGMLType
from blade.checkpoint.gguf.grouped import scales
from blade.chunks import in_chunks

CHUNK = 1 << 19  # numbers decoded at a time: enough to outweigh the calls, few enough for the cache
PLAIN_DTYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def dequantize(kind: GGMLType, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of raw, [rows, row_bytes] uint8 of whole blocks, as [rows, row_bytes / block_bytes * block_size].

    Plain types that are asked for as they are come without a copy.
    """
    if kind in PLAIN_DTYPES:
        return raw.view(PLAIN_DTYPES[kind]).to(dtype)
    blocks = raw.reshape(-1, kind.block_bytes)
    out = torch.empty(len(blocks), kind.block_size, dtype=dtype)

    def work(some: Tensor, target: Tensor) -> None:
        """Straight into float32, through a scratch that stays in cache into other types."""
        floats = target if dtype == torch.float32 else torch.empty(target.shape)
        _decode(kind, some, floats)
        if floats is not target:
            target.copy_(floats)

    in_chunks(work, CHUNK // kind.block_size, blocks, out)
    return out.view(len(raw), -1)


def _decode(kind: GGMLType, blocks: Tensor, out: Tensor) -> None:
    parts, group = scales(kind, blocks)
    q = quants(kind, blocks)
    if kind in VALUES:
        numbers = torch.tensor(VALUES[kind], dtype=torch.int8)[q.int()]
    else:
        zero = 0 if "minima" in parts else 2 ** (kind.bits - 1)
        numbers = (q - zero if zero else q).view(torch.int8)  # below 0 where the byte wraps around
    groups = out.view(len(blocks), -1, group)
    groups.copy_(numbers.view_as(groups)).mul_(_floats("scales", parts))
    if "minima" in parts:
        groups.add_(_floats("minima", parts))


def _floats(name: str, parts: dict[str, Tensor]) -> Tensor:
    """Of each group, [B, groups, 1] float32."""
    numbers, counted = parts[name].float(), parts.get(f"block_{name}")
    return (numbers if counted is None else numbers * counted.float()).unsqueeze(2)
