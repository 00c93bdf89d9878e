"""What a layer of the torch attention keeps: whole tokens in the model's dtype, or rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from blade_native.kv_codes import INT8, Rounded, hadamard, mode_of, round_heads, transforms_values

if TYPE_CHECKING:
    from blade import KVSpec
    from blade_native.kv_codes import Kept


def make(spec: KVSpec, num_blocks: int, device: torch.device) -> DenseKV:
    """One layer. Raises ConfigError for a storage that there is not."""
    mode = mode_of(spec)
    return RoundedKV(spec, mode, num_blocks, device) if mode else DenseKV(spec, num_blocks, device)


class Firsts(NamedTuple):
    """Where the sequences of a step's tokens begin."""

    blocks: Tensor  # [T] int64: the first block of each token's sequence
    rows: Tensor  # int64: tokens that are the first of their sequence


class DenseKV:
    """kv [num_blocks, block_size, 2, KV, D]: keys at 0 and values at 1, so that one token's KV lies together."""

    def __init__(self, spec: KVSpec, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, spec.block_size, 2, spec.num_kv_heads, spec.head_dim)
        self.kv = torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device)
        self.set_sizes(spec, num_blocks)

    def set_sizes(self, spec: KVSpec, num_blocks: int) -> None:
        self.num_blocks, self.block_size = num_blocks, spec.block_size
        itemsize: int = getattr(torch, spec.dtype).itemsize
        self.token_bytes = 2 * spec.num_kv_heads * spec.head_dim * itemsize  # once gathered

    def store(self, slots: Tensor, k: Tensor, v: Tensor, firsts: Callable[[], Firsts]) -> None:
        """k and v [T, KV, D], slots [T] int64."""
        self.kv.flatten(0, 1).index_copy_(0, slots, torch.stack((k, v), dim=1))

    def queries(self, q: Tensor) -> Tensor:
        """q [T, H, D] as the keys are kept."""
        return q

    def outputs(self, out: Tensor) -> Tensor:
        """out [T, H * D], sums of values as they are kept, as they are to be."""
        return out

    def origin(self, first_block: Tensor) -> Tensor | None:
        """What the keys of the sequence that begins with a block are relative to, [KV, D] float32; None: to nothing."""
        return None

    def clear(self, blocks: Tensor) -> None:
        """Whatever they held becomes finite."""
        self.kv.index_fill_(0, blocks, 0)

    def gather(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """[len(blocks), block_size, 2, KV, D] in `dtype`, which is the cache's own."""
        return self.kv.index_select(0, blocks)

    def gather_tokens(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """As gather, of single tokens: slots [N] -> [N, 2, KV, D]."""
        return self.kv.flatten(0, 1).index_select(0, slots)


class RoundedHeads:
    """Of tokens, or of sequences: codes [*shape, bytes] uint8 and numbers [*shape, scales and middles]."""

    def __init__(self, kept: Kept, shape: tuple[int, ...], head_dim: int, device: torch.device) -> None:
        self.kept = kept
        self.codes = torch.zeros((*shape, head_dim * kept.bits // 8), dtype=torch.uint8, device=device)
        self.numbers = torch.zeros((*shape, kept.num_numbers(head_dim)), dtype=kept.number, device=device)

    def store(self, at: Tensor, x: Tensor) -> None:
        """x [len(at), KV, D], at places along the dimensions before KV."""
        codes, scales, middles = round_heads(x, self.kept)
        packed = codes.view(torch.uint8)
        if self.kept.bits == 4:
            packed = packed[..., ::2] & 15 | packed[..., 1::2] << 4
        numbers = scales if middles is None else torch.cat((scales, middles), dim=-1)
        self.codes.view(-1, *packed.shape[1:]).index_copy_(0, at, packed)
        self.numbers.view(-1, *numbers.shape[1:]).index_copy_(0, at, numbers)

    def gather(self, at: Tensor) -> Tensor:
        """[len(at), ..., D] float32, at places along the first dimension."""
        return self._widened(self.codes.index_select(0, at), self.numbers.index_select(0, at))

    def gather_tokens(self, at: Tensor) -> Tensor:
        """[len(at), KV, D] float32, at places along the dimensions before KV."""
        codes, numbers = self.codes.flatten(0, -3), self.numbers.flatten(0, -3)
        return self._widened(codes.index_select(0, at), numbers.index_select(0, at))

    def _widened(self, codes: Tensor, numbers: Tensor) -> Tensor:
        if self.kept.bits == 4:
            nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).view(torch.int8)
            signed = (nibbles ^ 8) - 8
        else:
            signed = codes.view(self.kept.floats or torch.int8)
        scales, middles = numbers.chunk(2, dim=-1) if self.kept.affine else (numbers, None)
        return Rounded(signed, scales, middles).widened()


class RoundedKV(DenseKV):
    """Keys and values [num_blocks, block_size, KV, D], rounded each in its way.

    Keys are rounded after a Hadamard transform, and relative to the first key of their sequence (`origins`, kept with
    the sequence's first block): softmax does not notice what all keys have in common, and in some models that is ten
    times as large as what tells them apart.
    """

    def __init__(self, spec: KVSpec, mode: tuple[Kept, Kept], num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads)
        self.keys, self.values = (RoundedHeads(kept, shape, spec.head_dim, device) for kept in mode)
        self.origins = RoundedHeads(INT8, shape[::2], spec.head_dim, device)
        self.transforms_values, self.head_dim = transforms_values(mode[1]), spec.head_dim
        self.set_sizes(spec, num_blocks)

    def store(self, slots: Tensor, k: Tensor, v: Tensor, firsts: Callable[[], Firsts]) -> None:
        keys, (blocks, rows) = hadamard(k), firsts()
        self.origins.store(blocks[rows], keys[rows])
        self.keys.store(slots, keys - self.origins.gather(blocks))
        self.values.store(slots, hadamard(v) if self.transforms_values else v)

    def queries(self, q: Tensor) -> Tensor:
        return hadamard(q).to(q.dtype)

    def outputs(self, out: Tensor) -> Tensor:
        if not self.transforms_values:
            return out
        return hadamard(out.view(len(out), -1, self.head_dim)).flatten(-2).to(out.dtype)

    def origin(self, first_block: Tensor) -> Tensor | None:
        return self.origins.gather(first_block[None])[0]

    def clear(self, blocks: Tensor) -> None:
        self.keys.numbers.index_fill_(0, blocks, 0)
        self.values.numbers.index_fill_(0, blocks, 0)

    def gather(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack((self.keys.gather(blocks), self.values.gather(blocks)), dim=2).to(dtype)

    def gather_tokens(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack((self.keys.gather_tokens(slots), self.values.gather_tokens(slots)), dim=1).to(dtype)
