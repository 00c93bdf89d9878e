"""What keys and values are rounded to: the modes, and how they round, for all devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from blade import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from blade import KVSpec

SMALLEST_SCALE = 2.0**-126  # below it the inverse is not finite: codes are 0
SMALLEST_FLOAT = 2.0**-100  # likewise, of the largest magnitude of what becomes floats of 8 bits


class Kept(NamedTuple):
    """How keys, or values, are kept: codes of 8 or 4 bits, with a scale for every group of a head's channels.

    Integers c stand for scale * c, affine ones for scale * c + middle. Floats of 8 bits have a power of 2 as scale: a
    head's largest magnitude is at least 2^top, and below its double.
    """

    bits: int
    number: torch.dtype  # of scales and middles
    group: int | None = None  # channels that share them, in heads that are a multiple of it; None: the head
    affine: bool = False
    floats: torch.dtype | None = None  # None: integers
    top: int = 0

    def group_of(self, head_dim: int) -> int:
        return self.group if self.group and head_dim % self.group == 0 else head_dim

    def num_numbers(self, head_dim: int) -> int:
        """Of one head: scales and middles."""
        return head_dim // self.group_of(head_dim) * (2 if self.affine else 1)

    def head_bytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + self.num_numbers(head_dim) * self.number.itemsize


INT8 = Kept(8, torch.float32)
INT8_AFFINE = Kept(8, torch.float32, affine=True)
INT4 = Kept(4, torch.bfloat16, group=64)
INT4_AFFINE = Kept(4, torch.bfloat16, group=32, affine=True)
E4M3 = Kept(8, torch.bfloat16, floats=torch.float8_e4m3fn, top=7)
E5M2 = Kept(8, torch.bfloat16, floats=torch.float8_e5m2, top=14)

MODES = {  # KVSpec.storage -> how keys and how values are kept
    "int8": (INT8, INT8),
    "int8_affine": (INT8_AFFINE, INT8_AFFINE),
    "fp8_e4m3": (E4M3, E4M3),
    "fp8_e5m2": (E5M2, E5M2),
    "mix_i8i4": (INT8, INT4),
    "mix_f843i4": (E4M3, INT4),
    "mix_f852i4": (E5M2, INT4),
    "int4_affine": (INT4_AFFINE, INT4_AFFINE),
    "int4": (INT4, INT4),
}


class Rounded(NamedTuple):
    """Heads as codes."""

    codes: Tensor  # [..., D] int8, or floats of 8 bits
    scales: Tensor  # [..., groups], in the dtype of numbers
    middles: Tensor | None  # [..., groups] of affine codes

    def widened(self) -> Tensor:
        """[..., D] float32."""
        x = _in_groups(self.codes.float(), self.scales.shape[-1]) * self.scales.float().unsqueeze(-1)
        return (x if self.middles is None else x + self.middles.float().unsqueeze(-1)).flatten(-2)


def _in_groups(x: Tensor, num_groups: int) -> Tensor:
    """[..., D] -> [..., num_groups, D / num_groups]."""
    return x.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)


def round_heads(x: Tensor, kept: Kept) -> Rounded:
    """x [..., D] rounded. A group's scale is NaN where one of its numbers is not finite."""
    x = _in_groups(x.float(), x.shape[-1] // kept.group_of(x.shape[-1]))
    nothing = x.mul(0).sum(-1)
    if kept.floats is not None:
        return _round_floats(x, kept.floats, kept.top, nothing)
    most = 2 ** (kept.bits - 1)
    scales = (_scales(x, kept, most) + nothing).to(kept.number)
    middles = (x.amin(-1) + scales.float() * most).to(kept.number) if kept.affine else None
    centred = x if middles is None else x - middles.float().unsqueeze(-1)
    usable = (scales.float().abs() >= SMALLEST_SCALE).unsqueeze(-1)
    inverse = torch.where(usable, 1 / scales.float().unsqueeze(-1), 0)
    codes = torch.where(usable, centred * inverse, 0).round_().clamp_(-most, most - 1).to(torch.int8)
    return Rounded(codes.flatten(-2), scales, middles)


def _scales(x: Tensor, kept: Kept, most: int) -> Tensor:
    """Without middles 4 bits use all of their codes: the largest magnitude becomes -8, so that the scale has a sign."""
    low, high = x.amin(-1), x.amax(-1)
    if kept.affine:
        return (high - low) / (2 * most - 1)
    positive = high >= -low
    if kept.bits < 8:
        return torch.where(positive, high, low) / -most
    return torch.where(positive, high, -low) / (most - 1)


def _round_floats(x: Tensor, dtype: torch.dtype, top: int, nothing: Tensor) -> Rounded:
    most = x.abs().amax(-1)
    usable = (most >= SMALLEST_FLOAT) & (nothing == 0)
    exponents = torch.frexp(most.where(usable, 1)).exponent - 1 - top
    scaled = torch.ldexp(x, -exponents.unsqueeze(-1)).where(usable.unsqueeze(-1), 0)
    scales = torch.ldexp(torch.ones_like(most), exponents).where(usable, nothing)
    return Rounded(scaled.to(dtype).flatten(-2), scales.to(torch.bfloat16), None)


def transforms_values(kept: Kept) -> bool:
    """Whether values are rounded after a Hadamard transform, as keys always are; sums of them are transformed back."""
    return kept.bits < 8


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


def mode_of(spec: KVSpec) -> tuple[Kept, Kept] | None:
    """How keys and values are kept; None: in the model's dtype. Raises ConfigError for a storage that is not here."""
    if spec.storage is None:
        return None
    if spec.storage not in MODES:
        raise ConfigError(f"There is no KV cache in {spec.storage} here.", f"Use {' or '.join(MODES)}, or none.")
    return MODES[spec.storage]


def block_bytes(spec: KVSpec) -> tuple[int, int, int]:
    """Of one layer: keys, values, and what the keys of a sequence that begins in the block are relative to."""
    mode, num_heads = mode_of(spec), spec.block_size * spec.num_kv_heads
    if mode is None:
        plain = num_heads * spec.head_dim * int(getattr(torch, spec.dtype).itemsize)
        return plain, plain, 0
    keys, values = (num_heads * kept.head_bytes(spec.head_dim) for kept in mode)
    return keys, values, spec.num_kv_heads * INT8.head_bytes(spec.head_dim)
