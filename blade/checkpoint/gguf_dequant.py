"""GGML's block formats to floats: d * q, d * q + m or d * q - m for blocks of 32 or 256 numbers.

Block layouts after https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. The integers q are put
together eight bytes at a time in int64 lanes, and a chunk of blocks goes through all operations while it is in cache.
No product needs more than float32's 24 significant bits, so float32 results are those of GGML's own reference to the
last bit; other types are these, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from blade.checkpoint.gguf import GGMLType

_CHUNK = 1 << 19  # numbers decoded at a time: enough to outweigh the calls, few enough for the cache
_BYTES = 0x0101010101010101  # 1 in each byte of an int64
PLAIN_DTYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def dequantize(kind: GGMLType, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of raw, [rows, row_bytes] uint8 of whole blocks, as [rows, row_bytes / block_bytes * block_size].

    Plain types that are asked for as they are come without a copy.
    """
    if kind in PLAIN_DTYPES:
        return raw.view(PLAIN_DTYPES[kind]).to(dtype)
    blocks = raw.reshape(-1, kind.block_bytes)
    out = torch.empty(len(blocks), kind.block_size, dtype=dtype)
    decode, step = _DECODERS[kind], _CHUNK // kind.block_size
    with _one_thread() as num_threads:
        if len(blocks) < 2 * step or num_threads == 1:
            _decode(decode, blocks, out, step)
        else:
            share = -(-len(blocks) // num_threads)
            with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(
                    pool.map(
                        lambda b, o: _decode(decode, b, o, step), torch.split(blocks, share), torch.split(out, share)
                    )
                )
    return out.view(len(raw), -1)


@contextmanager
def _one_thread() -> Iterator[int]:
    """Have torch work on one thread for a while; gives how many it had. A thousand chunks of a dozen short operations
    are as many barriers for torch's own threads, which on busy cores wait for each other thirty times as long as the
    work takes. So the rows are shared out once, to threads of which each works alone."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield num_threads
    finally:
        torch.set_num_threads(num_threads)


def _decode(decode: Callable[[Tensor, Tensor], None], blocks: Tensor, out: Tensor, step: int) -> None:
    """`step` blocks at a time: straight into float32, through a scratch that stays in cache into other types."""
    scratch = torch.empty(min(step, len(blocks)), out.shape[1])
    for start in range(0, len(blocks), step):
        target = out[start : start + step]
        floats = target if out.dtype == torch.float32 else scratch[: len(target)]
        decode(blocks[start : start + step], floats)
        if floats is not target:
            target.copy_(floats)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: [B, 1] float32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Fields of 1, 2 or 4 bits, [..., n] uint8 -> [..., n * 8 / bits] int8 as [..., n / bits] int64: first the lowest
    field of each byte, then the next of each, and so on."""
    lanes = packed.clone(memory_format=torch.contiguous_format).view(torch.int64)
    mask = _BYTES * ((1 << bits) - 1)
    return torch.cat([(lanes >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def _spread_bits(packed: Tensor) -> Tensor:
    """Bit i of a byte to byte i of an int64, as 0 or 16: [..., n] uint8 -> [..., n] int64."""
    lanes = packed.to(torch.int64).mul_(_BYTES).bitwise_and_(-0x7FBFDFEFF7FBFDFF)  # 0x80, 0x40 ... 0x01
    return lanes.add_(_BYTES * 0x7F).bitwise_right_shift_(3).bitwise_and_(_BYTES * 16)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    q = _fields(blocks[:, 2:], 4).view(torch.int8) - 8
    out.copy_(q).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    q = _fields(blocks[:, 4:], 4).view(torch.int8)
    out.copy_(q).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    q = (_fields(blocks[:, 6:], 4) | _spread_bits(blocks[:, 2:6])).view(torch.int8) - 16
    out.copy_(q).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    q = (_fields(blocks[:, 8:], 4) | _spread_bits(blocks[:, 4:8])).view(torch.int8)
    out.copy_(q).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    q = _fields(blocks[:, 16:].view(-1, 4, 32), 4)
    _scale_k(blocks, q.view(torch.int8), out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    low = _fields(blocks[:, 48:].view(-1, 4, 32), 4)
    high = _fields(blocks[:, 16:48], 1).view_as(low) << 4
    _scale_k(blocks, (low | high).view(torch.int8), out)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    low = _fields(blocks[:, :128].view(-1, 2, 64), 4)
    high = _fields(blocks[:, 128:192].view(-1, 2, 32), 2) << 4
    q = (low | high).view(torch.int8) - 32
    d = blocks[:, 192:208].view(torch.int8) * _half(blocks, 208)  # [B, 16]: one for 16 numbers
    out.view(-1, 16, 16).copy_(q.view(-1, 16, 16)).mul_(d.unsqueeze(2))


def _scale_k(blocks: Tensor, q: Tensor, out: Tensor) -> None:
    """d * q - m with one d and m, 6 bits each times a float16 of the block, for 32 numbers."""
    low_d, low_m, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)  # 6 bits, 6 bits, 4 + 4 bits
    d = torch.cat([low_d & 63, (high & 15) | (low_d >> 2 & 48)], dim=1) * _half(blocks, 0)  # [B, 8]
    m = torch.cat([low_m & 63, (high >> 4) | (low_m >> 2 & 48)], dim=1) * _half(blocks, 2)
    out.view(-1, 8, 32).copy_(q.view(-1, 8, 32)).mul_(d.unsqueeze(2)).sub_(m.unsqueeze(2))


_DECODERS: dict[GGMLType, Callable[[Tensor, Tensor], None]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
