"""What a layer of the torch attention keeps: whole tokens in the model's dtype, or in int8 with a scale per head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from blade import ConfigError

if TYPE_CHECKING:
    from blade import KVSpec

STORAGES = ("int8",)  # of KVSpec.storage, beside None
SMALLEST_SCALE = 2.0**-126  # below it the inverse is not finite: codes are 0
MOST = 127  # |code|


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> codes int8 [..., D] and scales float32 [...], x ~ scale * code with |code| <= 127. The scale is NaN
    where a number is not finite."""
    x = x.float()
    scales = x.abs().amax(-1) / MOST + x.mul(0).sum(-1)
    usable = scales >= SMALLEST_SCALE
    inverse = torch.where(usable, 1 / scales, 0).unsqueeze(-1)
    return torch.where(usable.unsqueeze(-1), x * inverse, 0).round_().to(torch.int8), scales


def make(spec: KVSpec, num_blocks: int, device: torch.device) -> DenseKV:
    """One layer. Raises ConfigError for a storage that is neither dtype nor int8."""
    check_storage(spec)
    return (DenseKV if spec.storage is None else Int8KV)(spec, num_blocks, device)


def check_storage(spec: KVSpec) -> None:
    if spec.storage not in (None, *STORAGES):
        raise ConfigError(f"There is no KV cache in {spec.storage} here.", f"Use {' or '.join(STORAGES)}, or none.")


def block_bytes(spec: KVSpec) -> int:
    """Of one layer: numbers, and with int8 their float32 scales and an origin."""
    check_storage(spec)
    if spec.storage is not None:
        return 2 * spec.block_size * spec.num_kv_heads * (spec.head_dim + 4) + origin_bytes(spec)
    return 2 * spec.block_size * spec.num_kv_heads * spec.head_dim * int(getattr(torch, spec.dtype).itemsize)


def origin_bytes(spec: KVSpec) -> int:
    """Of a block: what the keys of a sequence that begins there are relative to."""
    return 0 if spec.storage is None else spec.num_kv_heads * (spec.head_dim + 4)


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] -> float32, every block of D's largest power of two times an orthonormal Hadamard matrix, which is its
    own inverse. Queries and keys keep their products, and keys lose their outliers (QuaRot, Ashkboos et al. 2024)."""
    d, x = x.shape[-1], x.float()
    block = d & -d
    half = 1
    while half < block:
        a, b = x.reshape(*x.shape[:-1], -1, 2, half).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x.mul(block**-0.5)


class Firsts(NamedTuple):
    """Where the sequences of a step's tokens begin."""

    blocks: Tensor  # [T] int64: the first block of each token's sequence
    rows: Tensor  # int64: tokens that are the first of their sequence


class DenseKV:
    """kv [num_blocks, block_size, 2, KV, D]: keys at 0 and values at 1, so that one token's KV lies together."""

    def __init__(self, spec: KVSpec, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, spec.block_size, 2, spec.num_kv_heads, spec.head_dim)
        self.kv = torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device)
        self.num_blocks, self.block_size = num_blocks, spec.block_size
        self.token_bytes = 2 * spec.num_kv_heads * spec.head_dim * self.kv.itemsize  # once gathered

    def store(self, slots: Tensor, k: Tensor, v: Tensor, firsts: Callable[[], Firsts]) -> None:
        """k and v [T, KV, D], slots [T] int64."""
        self.kv.flatten(0, 1).index_copy_(0, slots, torch.stack((k, v), dim=1))

    def queries(self, q: Tensor) -> Tensor:
        """q [T, H, D] as the keys are kept."""
        return q

    def clear(self, blocks: Tensor) -> None:
        """Whatever they held becomes finite."""
        self.kv.index_fill_(0, blocks, 0)

    def gather(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """[len(blocks), block_size, 2, KV, D] in `dtype`, which is the cache's own."""
        return self.kv.index_select(0, blocks)


class Int8KV(DenseKV):
    """kv as DenseKV's, but int8; scales [num_blocks, block_size, 2, KV] float32.

    Keys are rounded after a Hadamard transform, and relative to the first key of their sequence (`origins`, kept with
    the sequence's first block): softmax does not notice what all keys have in common, and in some models that is ten
    times as large as what tells them apart.
    """

    def __init__(self, spec: KVSpec, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, spec.block_size, 2, spec.num_kv_heads)
        self.kv = torch.zeros((*shape, spec.head_dim), dtype=torch.int8, device=device)
        self.scales = torch.zeros(shape, device=device)
        self.origins = torch.zeros((num_blocks, spec.num_kv_heads, spec.head_dim), dtype=torch.int8, device=device)
        self.origin_scales = torch.zeros((num_blocks, spec.num_kv_heads), device=device)
        self.num_blocks, self.block_size = num_blocks, spec.block_size
        self.token_bytes = 2 * spec.num_kv_heads * spec.head_dim * getattr(torch, spec.dtype).itemsize

    def store(self, slots: Tensor, k: Tensor, v: Tensor, firsts: Callable[[], Firsts]) -> None:
        keys, (blocks, rows) = hadamard(k), firsts()
        codes, scales = quantize(keys[rows])
        self.origins.index_copy_(0, blocks[rows], codes)
        self.origin_scales.index_copy_(0, blocks[rows], scales)
        keys -= self.origins[blocks] * self.origin_scales[blocks].unsqueeze(-1)
        codes, scales = quantize(torch.stack((keys, v.float()), dim=1))
        self.kv.flatten(0, 1).index_copy_(0, slots, codes)
        self.scales.flatten(0, 1).index_copy_(0, slots, scales)

    def queries(self, q: Tensor) -> Tensor:
        return hadamard(q).to(q.dtype)

    def clear(self, blocks: Tensor) -> None:
        self.scales.index_fill_(0, blocks, 0)

    def gather(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.kv.index_select(0, blocks) * self.scales.index_select(0, blocks).unsqueeze(-1)).to(dtype)
