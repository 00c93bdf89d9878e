"""What weight formats have in common: checked tensors, integers packed into words, groups, scales."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blade.chunks import in_chunks
from blade.errors import CheckpointError
from blade.nn.grouped import Matrix
from blade.types import GroupedWeight

if TYPE_CHECKING:
    from blade.contracts import Weights

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = (128, 64, 32, 16)  # numbers that may share a scale in a GroupedWeight, the best first
CHUNK = 1 << 17  # numbers that go through all operations together: they stay in cache
KEPT = {2: 4, 3: 4, 4: 4, 5: 5, 6: 6, 7: 8, 8: 8}  # bits of a checkpoint's integers, and those they are kept in


def matrix_shape(name: str, weights: Weights) -> tuple[int, int]:
    """Raises CheckpointError for what is no matrix, or an empty one."""
    shape = weights.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"Tensor {name} has shape {tuple(shape)}, which is no matrix.")
    return shape[0], shape[1]


def checked(name: str, weights: Weights, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> Tensor:
    """A tensor in its own dtype, one of `dtypes`; of any shape for None. Raises CheckpointError naming it."""
    if name not in weights.names():
        raise CheckpointError(f"The checkpoint has no tensor {name}, without which those beside it mean nothing.")
    tensor = weights.get(name)
    if shape is not None and tuple(tensor.shape) != shape:
        raise CheckpointError(f"Tensor {name} has shape {tuple(tensor.shape)}; to those beside it belongs {shape}.")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"Tensor {name} is of {str(tensor.dtype).removeprefix('torch.')}, not {wanted}.")
    return tensor


def checked_scales(name: str, weights: Weights, shape: tuple[int, ...] | None) -> Tensor:
    """Scales, all of them finite, in one of FLOATS."""
    scales = checked(name, weights, shape, *FLOATS)
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"Tensor {name} holds infinity or NaN.")
    return scales


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Rows of integers of 1 to 8 bits that follow each other from the lowest bit on, across words: [R, W] of any
    integer dtype -> [R, columns] uint8."""
    out = torch.empty(len(words), columns, dtype=torch.uint8)

    def work(words: Tensor, out: Tensor) -> None:
        packed = words.contiguous().view(torch.uint8)  # [r, bytes], little-endian
        out.copy_(_SPREAD.get(bits, _spread)(packed, bits)[:, :columns])

    in_chunks(work, max(1, CHUNK // columns), words, out)
    return out


def _spread(packed: Tensor, bits: int) -> Tensor:
    """[r, bytes] -> [r, numbers]: `bits` bytes hold eight."""
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(len(packed), -1, bits)
    out = packed.new_empty(*packed.shape[:2], 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        number = packed[..., byte] >> shift
        if shift + bits > 8:
            number |= packed[..., byte + 1] << (8 - shift)
        torch.bitwise_and(number, 2**bits - 1, out=out[..., i])
    return out.flatten(1)


def _nibbles(packed: Tensor, bits: int = 4) -> Tensor:
    """4 bits, a byte to two at once."""
    wide = packed.to(torch.int16)
    return wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F).view(torch.uint8)


def _pairs(packed: Tensor, bits: int = 2) -> Tensor:
    wide = _nibbles(packed).to(torch.int16)
    return wide.bitwise_or_(wide << 6).bitwise_and_(0x0303).view(torch.uint8)


_SPREAD: dict[int, Callable[[Tensor, int], Tensor]] = {2: _pairs, 4: _nibbles, 8: lambda packed, bits: packed}


def order_of(name: str, weights: Weights, k: int, group: int) -> Tensor | None:
    """Of a tensor with each feature's group, [K], the features sorted by it, int64; None where they lie so, or where
    there is no such tensor."""
    if name not in weights.names():
        return None
    groups = checked(name, weights, (k,), torch.int32, torch.int64).long()
    wanted = torch.arange(k) // group
    if groups.equal(wanted):
        return None
    order = groups.argsort(stable=True)
    if not groups[order].equal(wanted):
        raise CheckpointError(f"Tensor {name} does not put {group} features into each of {-(-k // group)} groups.")
    return order


def kept_group(k: int, group: int) -> int:
    """How many numbers share a scale in a GroupedWeight where `group` of a row of `k` do in the checkpoint: one of
    GROUPS, or what else divides both, on which no kernel computes."""
    return running_group(k, min(k, group))


def running_group(k: int, group: int) -> int:
    """The same where groups of `group` numbers run on over rows of `k`."""
    return next((kept for kept in GROUPS if k % kept == 0 and group % kept == 0), gcd(k, group))


def matrix_of(n: int, k: int, group: int, num_bytes: int) -> Matrix:
    """Of `num_bytes` where it is kept in groups of `group` numbers; plain where those are none of GROUPS."""
    return Matrix((n, k), num_bytes, plain=group not in GROUPS)


def regroup(values: Tensor, k: int, group: int, kept: int) -> Tensor:
    """What each group of `group` numbers has, [N, ceil(K / group)], for each of `kept`: [N, K / kept]."""
    if kept == group:
        return values.contiguous()
    return values[:, torch.arange(0, k, kept) // group]


def narrow(scales: Tensor) -> Tensor:
    """In float16 where that changes none by more than 2^-11 of itself, else as they are."""
    if scales.dtype is torch.float16:
        return scales
    half, exact = scales.half(), scales.float()
    close = (half.float() - exact).abs_() <= exact.abs() * 2**-11
    return half if bool(close.all()) else scales


def grouped_bytes(n: int, k: int, bits: int, group: int, zeros: bool = False) -> int:
    """Of a GroupedWeight with scales of 2 bytes, its integers packed."""
    return n * k * KEPT[bits] // 8 + n * (k // group) * (3 if zeros else 2)


def grouped(
    q: Tensor, bits: int, group: int, scales: Tensor, zeros: Tensor | None, order: Tensor | None = None
) -> GroupedWeight:
    """q [N, K] uint8 of `bits`, kept in those that there are kernels for; scales and zeros [N, K / group]. Without
    zeros 2**(bits - 1) stands for 0."""
    kept = KEPT[bits]
    if zeros is None and kept != bits:
        q = q + (2 ** (kept - 1) - 2 ** (bits - 1))
    return GroupedWeight(kept, group, q, narrow(scales), zeros=zeros, order=order)


def grouped_matrix(n: int, k: int, bits: int, group: int, zeros: bool = False) -> Matrix:
    """By the headers: what `grouped` gives."""
    kept = kept_group(k, group)
    return matrix_of(n, k, kept, grouped_bytes(n, k, bits, kept, zeros))
